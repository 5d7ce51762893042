"""What one step of the engine computes: host data from which the device's arrays are packed."""

from __future__ import annotations

import functools
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


@functools.lru_cache(maxsize=4096)
def step_tokens(demand: int, decodes: int, sizes: tuple[int, ...], floor: int) -> int:
    """How many of the tokens that are wanted now a step takes.

    A step is padded to the next of its sizes, so a prompt and the few that decode beside it may
    cost far more than the prompt: then a part of the prompt that fills a smaller size goes first,
    and its rest with the next tokens of the others.

    Args:
        demand: tokens wanted.
        decodes: how many of them are of sequences that decode, and come again in the next step.
        sizes: of steps, rising, the last of them the most tokens of a step.
        floor: a step costs at least what so many tokens cost.
    """
    return _cheapest(min(demand, sizes[-1]), decodes, sizes, floor)[1]


def _cheapest(demand: int, decodes: int, sizes: tuple[int, ...], floor: int) -> tuple[int, int]:
    """The cost of all that is wanted, and the tokens of the first of its steps."""
    whole = next(size for size in sizes if size >= demand)
    at_once = max(whole, floor), demand
    smaller = [size for size in sizes if 2 * decodes <= size < demand]
    if not smaller:
        return at_once
    first = smaller[-1]
    rest, _ = _cheapest(demand - first + decodes, decodes, sizes, floor)
    return min(at_once, (max(first, floor) + rest, first), key=lambda option: option[0])
