"""How a server behaves: `ServerSettings`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from serving.server.tools import TOOL_PARSERS
from weights import nearest


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens and what it lets through.

    host, port: the address; port 0 takes a free one.
    api_keys: one of them must come with every request; none lets everybody in.
    open_metrics: `/metrics` needs no key.
    allowed_origins: pages of these origins may call the server from browsers; "*" is all.
    served_names: names that requests may call the model by; none is the engine's own.
    checkpoint_defaults: fields that requests leave out come from the checkpoint, where it has them.
    tool_parser: how the model writes tool calls, one of `TOOL_PARSERS`.
    max_body_bytes: largest body of a request.
    max_answers: most answers to one request, prompts times choices; texts to score or embed too.
    drain_timeout_s: how long requests may go on after SIGTERM.
    ping_s: seconds without an event after which a stream gets a comment.
    keep_alive_s: seconds that a connection without requests stays open.
    metrics_prefix: of the metrics' names; "vllm" lets dashboards for vLLM work.
    stats_every_s: seconds between log lines of what the engine does; it says nothing when idle.
    log_requests: log prompts and answers too.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    open_metrics: bool = False
    allowed_origins: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    checkpoint_defaults: bool = True
    tool_parser: str = "hermes"
    max_body_bytes: int = 32 * 2**20
    max_answers: int = 128
    drain_timeout_s: float = 30.0
    ping_s: float = 15.0
    keep_alive_s: float = 30.0
    metrics_prefix: str = "sheaf"
    stats_every_s: float = 10.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_answers"):
            self._at_least(name, 1)
        for name in ("ping_s", "stats_every_s"):
            self._at_least(name, 0, excluded=True)
        for name in ("drain_timeout_s", "keep_alive_s"):
            self._at_least(name, 0)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be 0 (a free one) to 65535")
        if any(not key for key in self.api_keys):
            raise ValueError("api_keys has an empty key; leave it out, or give a text")
        if self.tool_parser not in TOOL_PARSERS:
            close = nearest(self.tool_parser, TOOL_PARSERS)
            raise ValueError(
                f"tool_parser is {self.tool_parser!r}; it must be one of "
                f"{', '.join(TOOL_PARSERS)}" + (f"; nearest: {close}" if close else "")
            )

    def _at_least(self, name: str, least: int, excluded: bool = False) -> None:
        value = getattr(self, name)
        if value < least or (excluded and value == least):
            right = f"more than {least}" if excluded else f"at least {least}"
            raise ValueError(f"{name} is {value}; it must be {right}")

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach the address."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"
