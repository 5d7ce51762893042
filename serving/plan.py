"""What one step of the engine computes: host data from which the device's arrays are packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from serving.request import Request


@dataclass(frozen=True)
class ScheduledSequence:
    """The part of one sequence that a step computes: positions `[start, stop)`.

    tokens: their ids; `UNREAD` is the token that the device sampled last for `slot`. slot: the row
    of the device's state. pages: the pages that hold positions from 0 on, also those of this step.
    samples: the step samples the token at position `stop`. ends: the prompt of a request that
    generates nothing is complete. reads: the step tells of the prompt what the request asks.
    """

    request: Request
    slot: int
    start: int
    stop: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool
    ends: bool
    reads: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One step: sequences in the order of the flat batch, decodes and chunks of prompts mixed.

    A step must store the keys and values of all its tokens in a layer before any of them attends:
    sequences may use pages that another one of the same step fills. preempted: requests that lost
    their pages to make room.
    """

    sequences: tuple[ScheduledSequence, ...]
    preempted: tuple[Request, ...] = ()

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the flat batch."""
        return sum(sequence.stop - sequence.start for sequence in self.sequences)

    @cached_property
    def sampling(self) -> tuple[ScheduledSequence, ...]:
        """The sequences that sample a token, in order."""
        return tuple(sequence for sequence in self.sequences if sequence.samples)
