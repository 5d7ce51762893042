"""A stream in which some batches are moved to the end of the run (LLM360 K2's answer to a spike).

With n batches deferred, a run of N steps reads all others in N - n steps and those n in its last n.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from training.task import Batch, Skips, Stream


@dataclasses.dataclass(frozen=True)
class DeferredStream:
    """`stream` in which `deferred` ranges of batches come last in a run of `steps`.

    `skips` are never used, as in the stream itself.
    """

    stream: Stream
    deferred: Skips
    steps: int
    skips: Skips = ()

    def __post_init__(self) -> None:
        if len(self._moved) > self.steps:
            raise ValueError(
                f"{len(self._moved)} batches cannot be deferred in a run of {self.steps} steps"
            )

    def batch_index(self, step: int) -> int:
        """Which batch a step uses."""
        turn = step - self._first
        if 0 <= turn < len(self._moved):
            return self._moved[turn]
        return self._others.batch_index(step - len(self._moved) * (turn >= 0))

    def batch_at(self, step: int, rows: Any = None) -> Batch:
        """The batch of a step, or its rows."""
        return self.stream.with_skips(()).batch_at(self.batch_index(step), rows)

    def iterate(self, start_step: int = 0, rows: Any = None) -> Iterator[Batch]:
        """The batches of `start_step` and all later ones, made ahead up to the deferred ones."""
        if start_step < self._first:
            count = self._first - start_step
            yield from itertools.islice(self._others.iterate(start_step, rows), count)
        for step in itertools.count(max(start_step, self._first)):
            yield self.batch_at(step, rows)

    def with_skips(self, skips: Skips) -> DeferredStream:
        """The same with other batches never used."""
        return dataclasses.replace(self, skips=tuple(skips))

    @property
    def _moved(self) -> list[int]:
        ranges = (range(start, stop) for start, stop in self.deferred)
        never = {batch for start, stop in self.skips for batch in range(start, stop)}
        return [batch for batch in itertools.chain(*ranges) if batch not in never]

    @property
    def _first(self) -> int:
        return self.steps - len(self._moved)

    @property
    def _others(self) -> Stream:
        return self.stream.with_skips((*self.skips, *self.deferred))
