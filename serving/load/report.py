"""What a load has shown: percentiles, rates, errors, and whether the server counted the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from serving.load.drive import Load
from serving.load.record import Record

PERCENTILES = (50, 90, 99)
BUSY = 0.8
"""Share of a core from which the client may be what limits the rate."""


@dataclass(frozen=True)
class Figures:
    """Percentiles 50, 90 and 99, mean and number of some values."""

    percentiles: tuple[float, ...]
    mean: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float], *, reached: bool = False) -> Figures | None:
        """Of values; None without any. Percentiles are interpolated between neighbours.

        reached: percentile p is what p % of the values reach at least.
        """
        array = np.fromiter(values, float)
        if not array.size:
            return None
        at = [100 - each if reached else each for each in PERCENTILES]
        return cls(tuple(np.percentile(array, at).tolist()), float(array.mean()), array.size)


@dataclass(frozen=True)
class Summary:
    """A load in numbers; times in seconds, rates a second of the whole load's time.

    first: to the first token. between: between two events of a stream. per_token: the mean of a
    request's tokens after its first. whole: of requests. speed: tokens a second of a request.
    errors: by kind; details: an example of each. client: share of a core that the generator took.
    counts: what was counted here and there, by name; None where the server does not say.
    """

    done: int
    failed: int
    planned: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first: Figures | None
    between: Figures | None
    per_token: Figures | None
    whole: Figures | None
    speed: Figures | None
    errors: Mapping[str, int]
    details: Mapping[str, str]
    client: float
    counts: Mapping[str, tuple[int, int]] | None

    @property
    def token_rate(self) -> float:
        """New tokens a second."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


def summarise(load: Load) -> Summary:
    """The numbers of a load, complete or not; failed requests count only as errors."""
    done = [record for record in load.records if record.error is None]
    failed = [record for record in load.records if record.error is not None]
    return Summary(
        done=len(done),
        failed=len(failed),
        planned=len(load.planned),
        seconds=load.seconds,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        cached_tokens=sum(record.cached_tokens for record in done),
        new_tokens=sum(record.completion_tokens for record in done),
        first=Figures.of(record.first for record in done if record.first is not None),
        between=Figures.of(gap for record in done for gap in record.gaps),
        per_token=Figures.of(r.per_token for r in done if r.per_token is not None),
        whole=Figures.of(record.seconds for record in done),
        speed=Figures.of(
            (r.completion_tokens / r.seconds for r in done if r.completion_tokens), reached=True
        ),
        errors=Counter(record.error for record in failed if record.error),
        details={r.error: r.detail for r in reversed(failed) if r.error and r.detail},
        client=load.busy_seconds / load.seconds if load.seconds else 0.0,
        counts=_counts(load, done) if not failed else None,
    )


def _counts(load: Load, done: Sequence[Record]) -> dict[str, tuple[int, int]] | None:
    """Here and there, of a load without failures."""
    if load.before is None or load.after is None or not all(record.counted for record in done):
        return None
    there = load.after.since(load.before)
    here = {
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "generation_tokens": sum(record.completion_tokens for record in done),
        "request_success": len(done),
    }
    return {name: (count, round(getattr(there, name))) for name, count in here.items()}


def table(summary: Summary) -> Table:
    """Percentiles; of speeds, what 50, 90 and 99 % of the requests reach."""
    shown = Table("", *(f"p{each}" for each in PERCENTILES), "mean", "of")
    rows = (
        ("time to first token, ms", summary.first, "requests"),
        ("between tokens, ms", summary.between, "gaps"),
        ("time per output token, ms", summary.per_token, "requests"),
        ("end to end, ms", summary.whole, "requests"),
    )
    for name, figures, what in rows:
        if figures is not None:
            cells = (f"{1e3 * value:,.1f}" for value in (*figures.percentiles, figures.mean))
            shown.add_row(name, *cells, f"{figures.count:,} {what}")
    if summary.speed is not None:
        cells = (f"{value:,.1f}" for value in (*summary.speed.percentiles, summary.speed.mean))
        shown.add_row("tokens/s of a request", *cells, f"{summary.speed.count:,} requests")
    return shown


def lines(summary: Summary) -> list[str]:
    """What stands under the table."""
    seconds = max(summary.seconds, 1e-9)
    prompts = f"{summary.prompt_tokens:,} prompt tokens"
    if summary.cached_tokens:
        prompts += f", {summary.cached_tokens:,} of them cached"
    said = [
        f"{summary.done} of {summary.planned} requests answered in {summary.seconds:.2f} s, "
        f"{prompts}, {summary.new_tokens:,} new tokens",
        f"throughput: {summary.token_rate:,.1f} new tokens/s, "
        f"{(summary.prompt_tokens + summary.new_tokens) / seconds:,.1f} with prompts, "
        f"{summary.done / seconds:,.2f} requests/s",
    ]
    for kind, count in sorted(summary.errors.items()):
        detail = summary.details.get(kind)
        said.append(f"failed: {count} x {kind}" + (f", such as: {detail}" if detail else ""))
    if summary.client > BUSY:
        said.append(
            f"this client took {summary.client:.0%} of a core, so it may be what limits the rate"
        )
    return said + _count_lines(summary)


def _count_lines(summary: Summary) -> list[str]:
    if summary.counts is None:
        return []
    wrong = {name: pair for name, pair in summary.counts.items() if pair[0] != pair[1]}
    if not wrong:
        return ["the server's /metrics counted the same tokens and answers"]
    told = ", ".join(f"{name} {a:,} here, {b:,} there" for name, (a, b) in wrong.items())
    return [f"the server's /metrics differ (does it serve others too?): {told}"]
