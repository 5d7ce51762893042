"""One request to a server with OpenAI's API, timed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from serving.load.http import HttpError, Response, Server
from serving.load.record import Record
from serving.load.settings import LoadSettings
from serving.load.workload import WORDS, Planned


class ServerError(Exception):
    """The server cannot be measured; the message says why."""


async def model_of(server: Server, settings: LoadSettings) -> str:
    """The name to send: as given, or the first that the server lists."""
    if settings.model is not None:
        return settings.model
    try:
        status, body = await server.json("GET", "/v1/models")
    except (OSError, HttpError, asyncio.IncompleteReadError) as error:
        raise ServerError(f"no server at {settings.url}: {error}") from error
    try:
        return str(body["data"][0]["id"])
    except (LookupError, TypeError):
        said = f"{settings.url}/v1/models answers {status}: {str(body)[:200]}"
        raise ServerError(f"{said}; name the model with --model, the key with --api-key") from None


async def tokens_per_word(server: Server, settings: LoadSettings, model: str) -> float:
    """How many tokens a word of `WORDS` has there, by what the server counts; 1 if it does not."""
    planned = Planned(-1, " ".join(WORDS), 1)
    body = body_of(planned, settings, model) | {"stream": False}
    body.pop("stream_options", None)
    status, answer = await server.json("POST", path_of(settings), body)
    if status != 200:
        raise ServerError(f"{settings.url} answers a first request with {status}: {answer}")
    usage = answer.get("usage") or {}
    return (usage.get("prompt_tokens") or len(WORDS)) / len(WORDS)


def path_of(settings: LoadSettings) -> str:
    """Where requests go."""
    return "/v1/chat/completions" if settings.chat else "/v1/completions"


def body_of(planned: Planned, settings: LoadSettings, model: str) -> dict[str, Any]:
    """What is sent."""
    body: dict[str, Any] = {"model": model, "max_tokens": planned.max_tokens}
    if settings.chat:
        body["messages"] = [{"role": "user", "content": planned.prompt}]
    else:
        body["prompt"] = planned.prompt
    body["temperature"] = settings.temperature
    if settings.temperature > 0.0:
        body["seed"] = settings.seed + max(planned.index, 0)
    if settings.ignore_eos:
        body["ignore_eos"] = True
    if settings.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body | json.loads(settings.fields)


async def send(
    server: Server, planned: Planned, settings: LoadSettings, model: str, began: float
) -> Record:
    """Send a request and take its answer; what goes wrong is in the record.

    began: when the load did, by `time.perf_counter`.
    """
    record = Record(planned.index, planned.max_tokens)
    body = body_of(planned, settings, model)
    sent = time.perf_counter()
    record.sent = sent - began
    try:
        async with (
            asyncio.timeout(settings.timeout_s),
            server.exchange("POST", path_of(settings), body) as response,
        ):
            if response.status != 200:
                record.error, record.detail = _refused(response.status, await response.body())
            elif "event-stream" in response.headers.get("content-type", ""):
                await _read_stream(response, record, sent)
            else:
                _take(json.loads(await response.body()), record)
    except TimeoutError:
        record.error = "timeout"
    except (OSError, HttpError, asyncio.IncompleteReadError) as error:
        record.error, record.detail = "connection", str(error)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        record.error, record.detail = "not understood", f"{type(error).__name__}: {error}"
    record.ended = time.perf_counter() - began
    return record


async def _read_stream(response: Response, record: Record, sent: float) -> None:
    texts: list[str] = []
    done = False
    async for data in response.events():
        now = time.perf_counter() - sent
        if data == b"[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if (error := chunk.get("error")) is not None:
            record.error, record.detail = "error in the stream", str(error)[:500]
            continue
        _count(chunk.get("usage"), record)
        for choice in chunk.get("choices") or ():
            text = text_of(choice)
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
            if text or not (choice.get("finish_reason") or choice.get("delta")):
                record.times.append(now)
                texts.append(text)
    record.text = "".join(texts)
    if not record.counted:
        record.completion_tokens = len(record.times)
    if record.error is None and not (done or record.finish_reason):
        record.error = "cut off"


def _take(answer: Mapping[str, Any], record: Record) -> None:
    """A whole answer."""
    choice = answer["choices"][0]
    record.text, record.finish_reason = text_of(choice), choice.get("finish_reason")
    _count(answer.get("usage"), record)


def _count(usage: Mapping[str, Any] | None, record: Record) -> None:
    if usage:
        record.prompt_tokens = usage.get("prompt_tokens") or 0
        record.completion_tokens = usage.get("completion_tokens") or 0
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        record.counted = True


def text_of(choice: Mapping[str, Any]) -> str:
    """The text that a choice brings, of a completion or a chat, streamed or not."""
    if "text" in choice:
        return choice["text"] or ""
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


def _refused(status: int, body: bytes) -> tuple[str, str]:
    try:
        error = json.loads(body)
        message = str((error.get("error") or error).get("message") or error)
    except (ValueError, AttributeError):
        message = body.decode("utf-8", "replace")
    return f"status {status}", message[:500]
