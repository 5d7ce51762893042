"""`POST /v1/chat/completions`: conversations to answers, tool calls among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from serving.outputs import TokenLogprob
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
from serving.server.logprobs import chat_logprobs
from serving.server.logs import Note
from serving.server.prompts import encode_messages
from serving.server.schemas import ChatRequest
from serving.server.service import Service
from serving.server.stream import PING, event, open_stream
from serving.server.structured import ForcedCalls, forced_calls
from serving.server.tools import SPECIAL_MARKS, TOOL_PARSERS, Call, Part, ToolParser


async def chat(service: Service, body: ChatRequest, note: Note) -> Response:
    """Answer a request."""
    service.check_ready()
    adapter = service.check_model(body.model)
    params = sampling(service, body, chat=True)
    forced = forced_calls(body)
    uses_tools = bool(body.tools) and body.tool_choice != "none"
    if forced is not None:  # Says all of the answer; `response_format` is of what is not calls.
        params = dataclasses.replace(params, structured_outputs=forced.form)
    elif uses_tools and service.settings.tool_parser in SPECIAL_MARKS:
        params = dataclasses.replace(params, skip_special_tokens=False)
    engine = service.engine
    tokens = await encode_messages(
        service.tokenizer, engine.template, body.messages, body, with_tools=uses_tools
    )
    job = make_job(service, [tokens], params, new_id("chatcmpl"), adapter)
    answer = Chat(service, body, params, job, uses_tools, forced)
    note.job = job
    job.start()
    if body.stream:
        return await open_stream(answer.events())
    return JsonResponse(await answer.whole())


@dataclass
class Chat:
    """The answer to one request."""

    service: Service
    body: ChatRequest
    params: SamplingParams
    job: Job
    uses_tools: bool
    forced: ForcedCalls | None = None

    def __post_init__(self) -> None:
        self._model = self.body.model or self.service.names[0]
        self._usage = Usage(self.job)
        self._reader = self._reader_of_calls()

    async def whole(self) -> dict[str, Any]:
        """The object that answers a request without stream."""
        head = Head(self.job.id, "chat.completion", self._model, self.service.fingerprint)
        choices = [self._choice(each) for each in await collect(self.job, self._usage)]
        return head(choices, usage=self._usage())

    def _choice(self, choice: Choice) -> dict[str, Any]:
        read = self._reader()
        parts = [*read.push(choice.text), *read.end()]
        calls = [part for part in parts if isinstance(part, Call)]
        content = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["content"] = content.strip() or None
            message["tool_calls"] = [_shown(call) for call in calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": read.finish_reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }

    async def events(self) -> Events:
        """The answer piece by piece."""
        head = Head(self.job.id, "chat.completion.chunk", self._model, self.service.fingerprint)
        running = Running.of(self._usage, self.body.stream_options)
        pieces = [Pieces(self._reader(), self._logprobs) for _ in range(self.job.n)]
        async with aclosing(self.job.deltas()) as deltas:
            async for delta in deltas:
                if delta is None:
                    yield PING
                    continue
                self._usage.add(delta)
                for piece in pieces[delta.index].of(delta):
                    choice = {"index": delta.index, **piece}
                    yield event(head([choice], **running()))
        if running.at_end:
            yield event(head([], usage=self._usage()))

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        return chat_logprobs(entries, self.service.texts, self.params.logprobs)

    def _reader_of_calls(self) -> Callable[[], Reader]:
        """What makes a new reader for each choice."""
        if not self.uses_tools:
            return Reader
        most = 1 if self.body.parallel_tool_calls is False else None
        if (forced := self.forced) is not None:
            return lambda: Reader(forced.parser(), most=most, named=forced.named)
        name = self.service.settings.tool_parser
        offered = frozenset(tool.function.name for tool in self.body.tools or ())
        hidden = None
        if name in SPECIAL_MARKS:
            special = set(self.service.tokenizer.special_tokens) - {*SPECIAL_MARKS[name]}
            hidden = re.compile("|".join(map(re.escape, special)) or "(?!)")
        return lambda: Reader(TOOL_PARSERS[name](offered), hidden, most)


@dataclass
class Reader:
    """Reads one choice: without a parser all is content.

    hidden: special tokens to leave out. most: calls to give; None is all. named: the request named
    the one to call.
    """

    parser: ToolParser | None = None
    hidden: re.Pattern[str] | None = None
    most: int | None = None
    named: bool = False
    _calls: int = 0

    def push(self, text: str) -> list[Part]:
        """The next parts."""
        if self.parser is None:
            return [text] if text else []
        return self._few(self.parser.push(self.hidden.sub("", text) if self.hidden else text))

    def end(self) -> list[Part]:
        """The last parts."""
        return [] if self.parser is None else self._few(self.parser.end())

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the choice ended: an answer that stopped after calls ended for them, but OpenAI's
        says `stop` where the call was named.
        """
        return "tool_calls" if self._calls and reason == "stop" and not self.named else reason

    def _few(self, parts: list[Part]) -> list[Part]:
        kept: list[Part] = []
        for part in parts:
            is_call = isinstance(part, Call)
            if is_call and self._calls == self.most:
                continue
            self._calls += is_call
            kept.append(part)
        return kept


@dataclass
class Pieces:
    """The chunks of one choice: who speaks, what was said, the calls, and the end."""

    reader: Reader
    logprobs: Callable[[Sequence[TokenLogprob]], dict[str, Any] | None]
    _begun: bool = False
    _calls: int = 0
    _waiting: list[TokenLogprob] = field(default_factory=list)

    def of(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Chunks of what the choice gained, without their index."""
        if not self._begun:
            self._begun = True
            yield self._piece({"role": "assistant", "content": ""})
        self._waiting += delta.logprobs or ()
        parts = self.reader.push(delta.text)
        if delta.finish_reason is not None:
            parts += self.reader.end()
        for part in parts:
            for said in self._said(part):
                yield self._piece(said, takes=True)
        if delta.finish_reason is not None:
            reason = self.reader.finish_reason(delta.finish_reason)
            yield self._piece({}, reason, delta.stop_reason, takes=True)

    def _said(self, part: Part) -> Iterator[dict[str, Any]]:
        if isinstance(part, str):
            yield {"content": part}
            return
        index, self._calls = self._calls, self._calls + 1
        begun = {
            "id": part.id,
            "type": "function",
            "function": {"name": part.name, "arguments": ""},
        }
        yield {"tool_calls": [{"index": index, **begun}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": part.arguments}}]}

    def _piece(
        self,
        said: dict[str, Any],
        reason: str | None = None,
        stop: str | int | None = None,
        takes: bool = False,
    ) -> dict[str, Any]:
        """A chunk, with the log-probabilities that came since the last one if it `takes` them."""
        shown = None
        if takes and self._waiting:
            shown, self._waiting = self.logprobs(self._waiting), []
        return {"delta": said, "logprobs": shown, "finish_reason": reason, "stop_reason": stop}


def _shown(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": call.function}
