"""What an engine gives back: `Output` deltas in an `Answer`, joined in a `Result`. No JAX here."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from serving.sampling_params import SamplingParams


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests: it was stopped, is being drained, or has failed."""


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token, its log-probability, its rank (1 is the likeliest), and the likeliest
    tokens with theirs, in falling order.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()

    def cut(self, count: int) -> TokenLogprob:
        """The same with so many likeliest."""
        return dataclasses.replace(self, top=self.top[:count])


@dataclass(frozen=True)
class Output:
    """What came since the last one of the same choice; joined, the whole answer.

    text: without what may still become part of a stop string. token_ids: the new tokens, the one
    that ended the answer among them. logprobs: one a token, if asked for.
    finish_reason: `stop`, `length`, `abort` or `error` in the last one, None before.
    stop_reason: the stop string or id; None for the end-of-text token; `timeout`, `queue_timeout`.
    prompt_tokens, cached_tokens, completion_tokens: of the choice so far.
    prompt_logprobs: in the first one, if asked for with `echo`: those of the prompt's tokens but
        the first.
    vector: `float32[d_model]`, of a request for one.
    """

    request_id: str
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    vector: np.ndarray | None = dataclasses.field(default=None, compare=False)


@dataclass(frozen=True)
class Result:
    """All of a request's answers, each joined, in order of choice.

    completion_tokens: of all candidates, those that `best_of` left out too.
    """

    request_id: str
    choices: tuple[Output, ...]
    completion_tokens: int

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first answer's tokens."""
        return self.choices[0].token_ids


class Answer(AsyncIterator[Output]):
    """The outputs of one request, as they come; ends when all of its choices have.

    Made by `Engine.submit` in the event loop that reads it. A request whose reader goes away must
    be aborted, as `async with` does.
    """

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        abort: Callable[[Answer], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.request_id, self.loop = request_id, loop
        self._params, self._abort = params, abort
        self._outputs: asyncio.Queue[Output | BaseException] = asyncio.Queue()
        self._candidates: dict[int, list[Output]] = {}
        self._open = params.candidates
        self._left = params.n
        self.completion_tokens = 0

    def abort(self) -> None:
        """End the request; what is not done ends with `abort`. May be called from any thread."""
        self._abort(self)

    async def all(self) -> Result:
        """Wait for the whole of every choice. If the waiting is cancelled, so is the request."""
        parts: dict[int, list[Output]] = {}
        try:
            async for output in self:
                parts.setdefault(output.choice, []).append(output)
        except asyncio.CancelledError:
            self.abort()
            raise
        choices = tuple(join(parts[choice]) for choice in sorted(parts))
        return Result(self.request_id, choices, self.completion_tokens)

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._left:
            self.abort()

    async def __anext__(self) -> Output:
        if not self._left:
            raise StopAsyncIteration
        output = await self._outputs.get()
        if isinstance(output, BaseException):
            self._left = 0
            raise output
        self._left -= output.finish_reason is not None
        return output

    def deliver(self, output: Output | BaseException) -> None:
        """Take an output from the engine, in the loop's own thread."""
        if isinstance(output, BaseException):
            self._outputs.put_nowait(output)
            return
        self._open -= output.finish_reason is not None
        if self._params.candidates > self._params.n:
            self._hold(output)
        elif self._params.candidates < self._params.n:
            for choice in range(self._params.n):
                self._give(dataclasses.replace(output, choice=choice))
        else:
            self._give(output)

    def _give(self, output: Output) -> None:
        self.completion_tokens += len(output.token_ids)
        self._outputs.put_nowait(output)

    def _hold(self, output: Output) -> None:
        """Keep a candidate until all have ended, then give the best."""
        self._candidates.setdefault(output.choice, []).append(output)
        self.completion_tokens += len(output.token_ids)
        if self._open:
            return
        joined = [join(self._candidates[choice]) for choice in sorted(self._candidates)]
        best = sorted(joined, key=mean_logprob, reverse=True)[: self._params.n]
        for choice, one in enumerate(best):
            kept = one.logprobs if self._params.logprobs is not None else None
            self._outputs.put_nowait(dataclasses.replace(one, choice=choice, logprobs=kept))


def join(outputs: Sequence[Output]) -> Output:
    """All outputs of one choice as one."""
    last = outputs[-1]
    logprobs = None
    if any(output.logprobs is not None for output in outputs):
        logprobs = tuple(each for output in outputs for each in output.logprobs or ())
    return dataclasses.replace(
        last,
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=logprobs,
        prompt_logprobs=outputs[0].prompt_logprobs,
    )


def mean_logprob(output: Output) -> float:
    """What `best_of` ranks by: the mean log-probability of the tokens; -inf without any."""
    values = [each.logprob for each in output.logprobs or ()]
    return math.fsum(values) / len(values) if values else -math.inf


def deliver_all(outputs: Iterable[tuple[Answer, Output | BaseException]]) -> None:
    """Hand outputs of one step to their answers, in the loop that reads these."""
    for answer, output in outputs:
        answer.deliver(output)
