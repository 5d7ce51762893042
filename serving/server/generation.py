"""What completions and chats share: from a request's fields to a job, and an answer's counts."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.fields import from_fields
from serving.outputs import TokenLogprob
from serving.request import Kind
from serving.sampling_params import (
    LEAST_TEMPERATURE,
    PROMPT_ONLY,
    SamplingParams,
    resolve,
    truncate,
)
from serving.server.errors import ApiError
from serving.server.job import Delta, Job, Prompt
from serving.server.schemas import ChatRequest, CompletionRequest, Generation, StreamOptions
from serving.server.service import Service
from serving.server.structured import take_form

HANDLED = frozenset((*CompletionRequest.model_fields, *ChatRequest.model_fields)) | {
    "metadata",
    "service_tier",
    "store",
}
"""Fields that the server reads itself, or that mean nothing to one of its own."""
REFUSED = {
    "chat_template": "templates in requests",
    "functions": "functions outside tools",
    "function_call": "functions outside tools",
    "audio": "audio",
}
"""Fields that would change an answer and that this server does not have."""
Events = AsyncGenerator[bytes]
logger = logging.getLogger("sheaf.server")


def sampling(service: Service, body: Generation, *, chat: bool = False) -> SamplingParams:
    """The parameters of a request. Raises what is wrong with them."""
    fields = body.given()
    for name, what in REFUSED.items():
        if fields.get(name) is not None:
            raise ApiError(400, f"{name}: this server has no {what}", param=name)
    form = take_form(fields)
    if 0.0 < (fields.get("temperature") or 0.0) < LEAST_TEMPERATURE:
        fields["temperature"] = LEAST_TEMPERATURE
    if body.stream_options is not None and not body.stream:
        message = "stream_options is given without stream; it must come with stream true"
        raise ApiError(400, message, param="stream_options")
    defaults = service.engine.defaults if service.settings.checkpoint_defaults else {}
    params, unknown = from_fields(fields, chat=chat, defaults=defaults, other_fields=HANDLED)
    if unknown:
        logger.warning("ignored unknown fields of a request: %s", ", ".join(sorted(unknown)[:16]))
    return dataclasses.replace(params, structured_outputs=form) if form else params


def make_job(
    service: Service,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    id: str,
    adapter: str | None = None,
) -> Job:
    """The work on prompts. Raises `ParameterError` for what the model or engine does not allow."""
    wanted = len(prompts) * max(params.n, params.candidates)
    _check_answers(service, wanted, "n")
    limits = service.engine.limits
    work = []
    for ids in prompts:
        kept = truncate(ids, params, limits)
        work.append(Prompt(kept, resolve(params, len(kept), limits)))
    return Job(service, work, id, adapter)


def prompt_job(
    service: Service,
    prompts: Sequence[Sequence[int]],
    kind: Kind,
    id: str,
    adapter: str | None = None,
) -> Job:
    """The work on prompts of which a score or a vector is wanted, nothing drawn."""
    _check_answers(service, len(prompts), "input")
    return Job(service, [Prompt(ids, PROMPT_ONLY, kind) for ids in prompts], id, adapter)


def _check_answers(service: Service, wanted: int, param: str) -> None:
    if wanted > (most := service.settings.max_answers):
        message = (
            f"the request asks for {wanted} answers, prompts times n; it must be at most {most}"
        )
        raise ApiError(400, message, param=param)


@dataclass(frozen=True)
class Head:
    """What every object of an answer begins with."""

    id: str
    object: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __call__(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object with these choices."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{secrets.token_hex(16)}"


@dataclass
class Usage:
    """Counts tokens over the deltas of a job."""

    job: Job
    _cached: dict[int, int] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        """Take a delta."""
        self._cached[delta.prompt] = delta.cached_tokens

    def __call__(self) -> dict[str, Any]:
        """The object `usage`."""
        prompt = sum(len(each.tokens) for each in self.job.prompts)
        completion = self.job.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


@dataclass(frozen=True)
class Running:
    """Usage in a stream, as `stream_options` asks for it."""

    usage: Usage
    at_end: bool
    always: bool

    @staticmethod
    def of(usage: Usage, options: StreamOptions | None) -> Running:
        """For the options of a request."""
        chosen = options or StreamOptions()
        return Running(usage, chosen.include_usage, chosen.continuous_usage_stats)

    def __call__(self) -> dict[str, Any]:
        """What a chunk has of it."""
        if self.always:
            return {"usage": self.usage()}
        return {"usage": None} if self.at_end else {}


@dataclass
class Choice:
    """One whole answer."""

    index: int
    prompt: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    vector: np.ndarray | None = None


async def collect(job: Job, usage: Usage) -> list[Choice]:
    """All choices of a job, in order."""
    found = [Choice(i, i // job.n) for i in range(job.n * len(job.prompts))]
    texts: list[list[str]] = [[] for _ in found]
    async with aclosing(job.deltas()) as deltas:
        async for delta in deltas:
            if delta is None:
                continue
            usage.add(delta)
            choice = found[delta.index]
            texts[delta.index].append(delta.text)
            choice.logprobs += delta.logprobs or ()
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
            choice.vector = delta.vector
            if delta.prompt_logprobs is not None:
                choice.prompt_logprobs = delta.prompt_logprobs
    for choice, parts in zip(found, texts, strict=True):
        choice.text = "".join(parts)
    return found
