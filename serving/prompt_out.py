"""What a request is told of its prompt, put together from the parts that steps compute of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from serving.outputs import TokenLogprob

Pooling = Literal["mean", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
LEAST_LENGTH = 1e-12


@dataclass(frozen=True)
class PromptPart:
    """What a step tells of the prompt's positions from `start` on.

    logprobs: of the token after each, as far as that is in the prompt.
    total, last: float32[d_model], the sum of the hidden states and the last one.
    """

    start: int
    logprobs: Sequence[TokenLogprob]
    total: np.ndarray
    last: np.ndarray


@dataclass(eq=False)
class PromptOut:
    """Takes the parts of one prompt of `length` tokens in order; they begin anew with position 0
    where the request lost its pages in between.
    """

    length: int
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _total: np.ndarray | None = None
    _last: np.ndarray | None = None
    _is_whole: bool = False

    def take(self, part: PromptPart, count: int) -> None:
        """Take a part of so many positions."""
        if self._is_whole:
            return
        if part.start == 0:
            self._logprobs, self._total = [], np.zeros_like(part.total)
        self._logprobs += part.logprobs
        self._total, self._last = self._total + part.total, part.last
        self._is_whole = part.start + count >= self.length

    def logprobs(self, top: int) -> tuple[TokenLogprob, ...]:
        """Those of the prompt's tokens but the first, each with the `top` likeliest."""
        return tuple(each.cut(top) for each in self._logprobs)

    def vector(self, pooling: str) -> np.ndarray:
        """float32[d_model] of length 1: the mean of the hidden states, or the last one."""
        found = self._total if pooling == "mean" else self._last
        assert found is not None
        return found / np.maximum(np.linalg.norm(found), LEAST_LENGTH)
