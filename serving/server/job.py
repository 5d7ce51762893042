"""One request's work in the engine: its prompts' answers, mixed as they come.

Whoever reads `deltas` to the end, leaves it early or is cancelled: what is not done is aborted, for
all prompts and choices together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.checks import ParameterError
from serving.outputs import Answer, EngineStoppedError, Output, TokenLogprob
from serving.request import Kind
from serving.sampling_params import SamplingParams
from serving.scheduler import QueueFullError
from serving.server.errors import ApiError
from serving.server.service import Service

ENDED, QUIET = object(), object()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's ids and what to do with them: parameters, and what is wanted."""

    tokens: Sequence[int]
    params: SamplingParams
    kind: Kind = Kind.GENERATE


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained; `index` counts the choices of all prompts.

    finish_reason: in a choice's last delta. prompt_logprobs: in its first, where asked for.
    vector: of a request for one.
    """

    index: int
    prompt: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None
    finish_reason: str | None
    stop_reason: str | int | None
    cached_tokens: int
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    vector: np.ndarray | None = None


class Job:
    """The answers to the prompts of one request, `n` choices each.

    prompts: all with one `n`. id: unique in the engine. adapter: of all prompts, None for the
    model itself. finish_reasons: of the choices that ended, by index. texts: of each choice so far,
    where requests are logged.
    """

    def __init__(
        self, service: Service, prompts: Sequence[Prompt], id: str, adapter: str | None = None
    ) -> None:
        self.id, self.prompts, self.adapter = id, prompts, adapter
        self.n = prompts[0].params.n
        self.finish_reasons: dict[int, str] = {}
        self.texts: dict[int, list[str]] = {}
        self._service = service
        self._answers: list[Answer] = []
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._pumps: list[asyncio.Task[None]] = []
        self._open = set(range(self.n * len(prompts)))

    @property
    def completion_tokens(self) -> int:
        """All that were generated for it, those of answers that `best_of` left out too."""
        return sum(answer.completion_tokens for answer in self._answers)

    def start(self) -> None:
        """Hand the prompts to the engine. Raises what a client may be told."""
        self._service.enter(self)
        try:
            for number, prompt in enumerate(self.prompts):
                answer = self._service.engine.submit(
                    prompt.tokens,
                    prompt.params,
                    request_id=f"{self.id}-{number}",
                    adapter=self.adapter,
                    kind=prompt.kind,
                )
                self._answers.append(answer)
        except Exception as error:
            self.close()
            if isinstance(error, ValueError) and not isinstance(error, ParameterError):
                raise ApiError(400, str(error), param="prompt") from error
            raise self._refusal(error) from error
        pumps = (self._pump(number, answer) for number, answer in enumerate(self._answers))
        self._pumps = [asyncio.create_task(pump) for pump in pumps]

    async def deltas(self) -> AsyncGenerator[Delta | None]:
        """What the choices gain; None where nothing came for `ping_s`."""
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        self._ping(loop)
        try:
            while self._open:
                item = await self._queue.get()
                self._last = loop.time()
                if item is QUIET:
                    yield None
                elif (delta := self._take(item)) is not None:
                    yield delta
        finally:
            self.close()

    def _ping(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say it if nothing came for `ping_s`, and look again when that may be so. One timer a
        request; a timeout for each token would be a good part of the token's cost.
        """
        left = self._last + self._service.settings.ping_s - loop.time()
        if left <= 0.0:
            self._queue.put_nowait(QUIET)
            left = self._service.settings.ping_s
        self._timer = loop.call_later(left, self._ping, loop)

    def close(self) -> None:
        """Abort what is not done."""
        for answer in self._answers if self._open else ():
            answer.abort()
        if self._timer is not None:
            self._timer.cancel()
        for pump in self._pumps:
            pump.cancel()
        self._pumps = []
        self._service.leave(self)

    def fail(self, error: ApiError) -> None:
        """End with an error."""
        self._queue.put_nowait(error)

    async def _pump(self, prompt: int, answer: Answer) -> None:
        try:
            async for output in answer:
                self._queue.put_nowait((prompt, output))
            self._queue.put_nowait((prompt, ENDED))
        except Exception as error:
            self._queue.put_nowait(error)

    def _take(self, item: Any) -> Delta | None:
        """What an item of the queue says; None where it says nothing."""
        if isinstance(item, Exception):
            raise self._refusal(item)
        prompt, output = item
        if output is ENDED:
            if not self._open.isdisjoint(range(prompt * self.n, (prompt + 1) * self.n)):
                raise RuntimeError(f"the engine's answer to {self.id}-{prompt} ended too early")
            return None
        if output.finish_reason in ("error", "abort"):
            raise _failure(output)
        return self._delta(prompt, output)

    def _delta(self, prompt: int, output: Output) -> Delta:
        index = prompt * self.n + output.choice
        if self._service.settings.log_requests:
            self.texts.setdefault(index, []).append(output.text)
        if output.finish_reason is not None:
            self.finish_reasons[index] = output.finish_reason
            self._open.discard(index)
        return Delta(
            index=index,
            prompt=prompt,
            text=output.text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            cached_tokens=output.cached_tokens,
            prompt_logprobs=output.prompt_logprobs,
            vector=output.vector,
        )

    def _refusal(self, error: Exception) -> Exception:
        """What a client is told of an error of the engine's."""
        if isinstance(error, QueueFullError):
            return ApiError(429, str(error), retry_after=self._service.retry_after())
        if isinstance(error, EngineStoppedError):
            return ApiError(503 if self._service.engine.failure is None else 500, str(error))
        return error


def _failure(output: Output) -> ApiError:
    if output.finish_reason == "abort":
        return ApiError(503, "the engine stopped before the answer was complete")
    if output.stop_reason in ("queue_timeout", "timeout"):
        message = "the request waited longer than requests may"
        return ApiError(503, message, code=str(output.stop_reason))
    return ApiError(500, "the engine failed on this request; the server's log says why")
