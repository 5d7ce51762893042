"""What was seen of one request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Record:
    """A request and its answer. Times are in seconds: `sent` and `ended` from the start of the
    load, `times` from when it was sent, one for each event of the stream that brought text.

    error: the kind of failure; None for an answer that is complete.
    counted: the server said how many tokens it generated; else events are counted.
    """

    index: int
    asked_tokens: int
    sent: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    counted: bool = False
    finish_reason: str | None = None
    text: str = ""
    error: str | None = None
    detail: str | None = None

    @property
    def seconds(self) -> float:
        """From sending to the end."""
        return self.ended - self.sent

    @property
    def first(self) -> float | None:
        """Time to the first token; None for an answer that was not streamed."""
        return self.times[0] if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Times between events."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def per_token(self) -> float | None:
        """Mean time of a token after the first."""
        if self.completion_tokens < 2 or not self.times:
            return None
        return (self.times[-1] - self.times[0]) / (self.completion_tokens - 1)

    def as_row(self) -> dict[str, Any]:
        """For a line of JSON; times to the microsecond."""
        row = dataclasses.asdict(self)
        row |= {name: round(row[name], 6) for name in ("sent", "ended")}
        return row | {"times": [round(time, 6) for time in self.times]}
