"""What an engine counts: raw numbers, from which a server makes its metrics.

Names are those that users of vLLM know; a server puts its prefix in front.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

_TO_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_TO_TOKEN += (10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_BETWEEN += (10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_REQUEST += (120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_STEP_TOKENS = tuple(float(2**power) for power in (0, *range(3, 15)))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass
class Histogram:
    """Counts of values up to each edge, above the last one last; and their sum."""

    edges: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.edges) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.edges, value)] += times
        self.total += value * times

    def copy(self) -> Histogram:
        """The counts as they are now."""
        return dataclasses.replace(self, counts=list(self.counts))


def histograms(max_model_len: int) -> dict[str, Histogram]:
    """Empty histograms by name."""
    lengths = _one_two_five(max_model_len)
    edges = {
        "time_to_first_token_seconds": _TO_TOKEN,
        "inter_token_latency_seconds": _BETWEEN,
        "request_time_per_output_token_seconds": _BETWEEN,
        "e2e_request_latency_seconds": _REQUEST,
        "request_queue_time_seconds": _REQUEST,
        "request_prefill_time_seconds": _REQUEST,
        "request_decode_time_seconds": _REQUEST,
        "request_inference_time_seconds": _REQUEST,
        "request_prompt_tokens": lengths,
        "request_generation_tokens": lengths,
        "request_params_max_tokens": lengths,
        "request_params_n": _CHOICES,
        "iteration_tokens_total": _STEP_TOKENS,
        "step_seconds": _TO_TOKEN,
    }
    return {name: Histogram(each) for name, each in edges.items()}


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment; counters count from its start.

    running, waiting: sequences. pages_free: those that nobody holds, cached ones among them.
    prefix_queries, prefix_hits, prompt_tokens, generation_tokens: tokens.
    finished: sequences that ended, by `stop`, `length`, `abort`, `error`.
    compilations: programs, by phase `warmup` and `serving`.
    page_bytes: bytes of a page on a device. histograms: by name.
    running_adapters, waiting_adapters: names of those that a sequence has.
    """

    running: int
    waiting: int
    pages_free: int
    pages_total: int
    page_size: int
    page_bytes: int
    steps: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    finished: Mapping[str, int]
    compilations: Mapping[str, int]
    histograms: Mapping[str, Histogram]
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()

    @property
    def kv_cache_usage(self) -> float:
        """The fraction of pages that somebody holds."""
        return 1.0 - self.pages_free / self.pages_total

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes of keys and values of one token on a device, all layers together."""
        return self.page_bytes / self.page_size


@dataclass
class Times:
    """When what happened to a sequence, in seconds of one clock; None before."""

    arrival: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def note_start(self, now: float) -> None:
        """A step computes a part of it; only the first counts."""
        self.started = now if self.started is None else self.started

    def note_token(self, now: float, into: Mapping[str, Histogram]) -> None:
        """A token came."""
        if self.last_token is None:
            self.first_token = now
            into["time_to_first_token_seconds"].observe(now - self.arrival)
        else:
            into["inter_token_latency_seconds"].observe(now - self.last_token)
        self.last_token = now

    def note_end(self, now: float, tokens: int, into: Mapping[str, Histogram]) -> None:
        """The sequence ended with so many tokens; one that never ran is counted by its wait."""
        into["e2e_request_latency_seconds"].observe(now - self.arrival)
        started = now if self.started is None else self.started
        into["request_queue_time_seconds"].observe(started - self.arrival)
        if self.first_token is None or self.last_token is None:
            return
        prefill, decode = self.first_token - started, self.last_token - self.first_token
        into["request_prefill_time_seconds"].observe(prefill)
        into["request_decode_time_seconds"].observe(decode)
        into["request_inference_time_seconds"].observe(prefill + decode)
        if tokens > 1:
            into["request_time_per_output_token_seconds"].observe(decode / (tokens - 1))


def _one_two_five(most: int) -> tuple[float, ...]:
    series = [first * 10.0**power for power in range(8) for first in (1, 2, 5)]
    return tuple(edge for edge in series if edge <= most) or (1.0,)
