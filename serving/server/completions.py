"""`POST /v1/completions`: prompts to texts, at once or as a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from serving.sampling_params import SamplingParams
from serving.server.errors import JsonResponse
from serving.server.generation import (
    Choice,
    Events,
    Head,
    Running,
    Usage,
    collect,
    make_job,
    new_id,
    sampling,
)
from serving.server.job import Delta, Job
from serving.server.logprobs import CompletionLogprobs
from serving.server.logs import Note
from serving.server.prompts import encode_prompts
from serving.server.schemas import CompletionRequest
from serving.server.service import Service
from serving.server.stream import PING, event, open_stream

Logprobs = Callable[[Choice | Delta], dict[str, Any] | None]


async def complete(service: Service, body: CompletionRequest, note: Note) -> Response:
    """Answer a request."""
    service.check_ready()
    adapter = service.check_model(body.model)
    params = sampling(service, body)
    prompts = await encode_prompts(
        service.tokenizer, body.prompt, add_special_tokens=body.add_special_tokens
    )
    job = make_job(service, prompts, params, new_id("cmpl"), adapter)
    answer = Completion(service, body, params, job)
    note.job = job
    job.start()
    if body.stream:
        return await open_stream(answer.events())
    return JsonResponse(await answer.whole())


@dataclass
class Completion:
    """The answer to one request."""

    service: Service
    body: CompletionRequest
    params: SamplingParams
    job: Job

    def __post_init__(self) -> None:
        model = self.body.model or self.service.names[0]
        self._head = Head(self.job.id, "text_completion", model, self.service.fingerprint)
        self._usage = Usage(self.job)

    def prompts(self) -> list[str]:
        """The texts of the prompts; a text that the request has as it stands there."""
        decode = self.service.tokenizer.decode
        given, kept = self.body.prompt, self.params.truncate_prompt_tokens
        if kept is None and isinstance(given, str):
            return [given]
        if kept is None and isinstance(given, list) and isinstance(given[0], str):
            return [str(text) for text in given]
        return [decode(prompt.tokens) for prompt in self.job.prompts]

    async def whole(self) -> dict[str, Any]:
        """The object that answers a request without stream."""
        echoed = self.prompts() if self.params.echo else None
        choices = []
        for choice in await collect(self.job, self._usage):
            choices.append(
                {
                    "index": choice.index,
                    "text": (echoed[choice.prompt] if echoed else "") + choice.text,
                    "logprobs": self._logprobs()(choice),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
            )
        return self._head(choices, usage=self._usage())

    async def events(self) -> Events:
        """The same piece by piece."""
        running = Running.of(self._usage, self.body.stream_options)
        echoed = self.prompts() if self.params.echo else []
        begun: dict[int, Logprobs] = {}
        async with aclosing(self.job.deltas()) as deltas:
            async for delta in deltas:
                if delta is None:
                    yield PING
                    continue
                self._usage.add(delta)
                text = delta.text
                if delta.index not in begun:
                    begun[delta.index] = self._logprobs()
                    text = (echoed[delta.prompt] if echoed else "") + text
                elif not (text or delta.token_ids or delta.finish_reason):
                    continue
                choice = {
                    "index": delta.index,
                    "text": text,
                    "logprobs": begun[delta.index](delta),
                    "finish_reason": delta.finish_reason,
                    "stop_reason": delta.stop_reason,
                }
                yield event(self._head([choice], **running()))
        if running.at_end:
            yield event(self._head([], usage=self._usage()))

    def _logprobs(self) -> Logprobs:
        """What shows the log-probabilities of a choice, part by part; with `echo` first those of
        the prompt, whose first token has none.
        """
        if (top := self.params.logprobs) is None:
            return lambda part: None
        shown = CompletionLogprobs(self.service.texts, top, self.body.return_tokens_as_token_ids)

        def show(part: Choice | Delta) -> dict[str, Any]:
            first = None
            if part.prompt_logprobs is not None:
                first = int(self.job.prompts[part.prompt].tokens[0])
            return shown([*(part.prompt_logprobs or ()), *(part.logprobs or ())], first)

        return show
