"""The plans of a search, compiled ahead: what the model promises beside what the compiler needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from planning.compile_ahead import Plan, TooLittleMemory, Topology, compile_training
from planning.search import Candidate
from training.config import RunConfig


@dataclass(frozen=True)
class Verified:
    """A plan of the search and its compiled step; `why` there is none."""

    candidate: Candidate
    plan: Plan | None
    why: str = ""

    @property
    def fits(self) -> bool:
        """Whether it compiles and fits."""
        return self.plan is not None and self.plan.fits

    @property
    def seconds(self) -> float:
        """Of a step if nothing overlaps."""
        return self.plan.serial_seconds if self.plan is not None and self.fits else float("inf")


def verify(
    candidates: Sequence[Candidate],
    config_of: Callable[[list[str]], RunConfig],
    topology: Topology,
) -> Iterator[Verified]:
    """Compile each candidate's training step, one after another.

    config_of: the config with some flags of `train.py`.
    """
    for each in candidates:
        try:
            yield Verified(each, compile_training(config_of(each.flags().split()), topology))
        except TooLittleMemory as error:
            yield Verified(each, None, str(error))
