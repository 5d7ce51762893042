"""The server's own counts, from the Prometheus page that vLLM and Sheaf have."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from dataclasses import dataclass

from serving.load.http import HttpError, Server

_SAMPLE = re.compile(r"^(?:\w+:)?(\w+?)(?:_total)?(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Counters:
    """Tokens and answers that a server has counted since its start."""

    prompt_tokens: float
    generation_tokens: float
    request_success: float

    def since(self, before: Counters) -> Counters:
        """What came since."""
        return Counters(
            self.prompt_tokens - before.prompt_tokens,
            self.generation_tokens - before.generation_tokens,
            self.request_success - before.request_success,
        )


async def read_counters(server: Server) -> Counters | None:
    """The counts now; None for a server that does not show them."""
    try:
        async with server.exchange("GET", "/metrics") as response:
            text = (await response.body()).decode("utf-8", "replace")
    except (OSError, HttpError, asyncio.IncompleteReadError):
        return None
    return parse_counters(text) if response.status == 200 else None


def parse_counters(text: str) -> Counters | None:
    """The counts of a Prometheus page, summed over labels; None if it has none of tokens. A kind of
    end that has not happened yet may be missing.
    """
    sums: dict[str, float] = defaultdict(float)
    for name, value in _SAMPLE.findall(text):
        if name in Counters.__annotations__:
            sums[name] += float(value)
    if not {"prompt_tokens", "generation_tokens"} <= sums.keys():
        return None
    return Counters(**{name: sums[name] for name in Counters.__annotations__})
