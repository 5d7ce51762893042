"""Talking to a model, in process or over HTTP, by one protocol: `complete, chat, embed, score`.

    client = EngineClient(Engine.open("runs/quickstart"))
    client = OpenAIClient("http://127.0.0.1:8000/v1")
    completion = await client.complete("Once upon a time", SamplingParams(max_tokens=16))

One call is one request; many are made at once (`asyncio.gather`), and the server batches them.
Programs and evaluations know no more of a model than this.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.chat import encode_chat
from data.tokenizers.protocol import REPLACEMENT
from serving.engine import RETRY_S, Engine, Prompt
from serving.outputs import Output, TokenLogprob
from serving.sampling_params import SamplingParams
from serving.scheduler import QueueFullError

Messages = Sequence[Mapping[str, Any]]
BUSY = (429, 502, 503, 504)


class ClientError(RuntimeError):
    """A request that a server refused or did not answer. status: of HTTP; None without one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Choice:
    """One answer: its text, and why it ended (`stop`, `length`, …).

    token_ids: the tokens that it is the text of; a server does not tell them.
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answers to a request, and how many tokens it took."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int

    @property
    def text(self) -> str:
        """The first answer's."""
        return self.choices[0].text


@dataclass(frozen=True)
class TextToken:
    """A token of a text that was scored.

    offset: where in the text it begins, in characters. logprob: given those before it; None for the
    first. greedy: whether it was the likeliest.
    """

    offset: int
    logprob: float | None
    greedy: bool


class Client(Protocol):
    """What programs and evaluations ask of a model."""

    @property
    def model_name(self) -> str:
        """What the model is called."""
        ...

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """Go on with a text or ids."""
        ...

    async def chat(self, messages: Messages, params: SamplingParams) -> Completion:
        """The next message of a conversation."""
        ...

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """`float32[texts, d]`, a vector of length 1 each."""
        ...

    async def score(self, text: str) -> list[TextToken]:
        """Log-probability of each token of a text, given those before it."""
        ...

    def close(self) -> None:
        """Let go of what the client holds; an engine that was given goes on."""
        ...


class EngineClient:
    """An engine in this process; it is started if need be, and left running."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.start()

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return self.engine.model_name

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """See `Client`. Raises `ParameterError` for what this engine does not allow."""
        tokens = self.engine.encode(prompt) if isinstance(prompt, str) else prompt
        while True:
            try:
                result = await self.engine.submit(tokens, params).all()
                break
            except QueueFullError:  # Others fill it; there is time.
                await asyncio.sleep(RETRY_S)
        choices = tuple(_choice(output) for output in result.choices)
        return Completion(choices, result.choices[0].prompt_tokens, result.completion_tokens)

    async def chat(self, messages: Messages, params: SamplingParams) -> Completion:
        """See `Client`. Raises `ClientError` for a model without a chat template."""
        tokenizer, template = self.engine.tokenizer, self.engine.template
        if tokenizer is None or template is None:
            raise ClientError(
                f"{self.model_name} has no chat template; ask with prompts, or put "
                "chat_template.jinja into the checkpoint"
            )
        ids = await asyncio.to_thread(
            encode_chat, tokenizer, template, messages, add_generation_prompt=True
        )
        return await self.complete([int(i) for i in ids], params)

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Client`."""
        ids = [self.engine.encode(text) for text in texts]
        return await asyncio.to_thread(self.engine.embed, ids)

    async def score(self, text: str) -> list[TextToken]:
        """See `Client`."""
        ids = self.engine.encode(text)
        entries = await asyncio.to_thread(self.engine.score, ids)
        offsets = _offsets(self.engine, text, ids)
        first = TextToken(offsets[0], None, False)
        return [first, *map(_scored, offsets[1:], entries)]

    def close(self) -> None:
        """See `Client`."""


def _choice(output: Output) -> Choice:
    return Choice(output.text, output.finish_reason or "error", tuple(output.token_ids))


def _scored(offset: int, entry: TokenLogprob) -> TextToken:
    return TextToken(offset, entry.logprob, entry.rank == 1)


def _offsets(engine: Engine, text: str, ids: Sequence[int]) -> list[int]:
    """Where each of a prompt's tokens begins in its text; those put around it, at its ends."""
    assert engine.tokenizer is not None
    prefix = len(engine.tokenizer.prompt_prefix)
    spans = engine.tokenizer.encode_with_spans(text)[1]
    inner = [int(start) for start, _ in spans]
    return ([0] * prefix + inner + [len(text)] * len(ids))[: len(ids)]


class OpenAIClient:
    """A server with OpenAI's API, reached at `base_url` (which ends in `/v1`).

    Args:
        base_url: `http://host:port/v1`, or https.
        model: which of the server's models; None takes the first that it lists.
        api_key: sent as a bearer token.
        parallel: requests at once.
        timeout_s: most seconds that a request may take.
        retry_s: how long a busy or unreachable server is asked again.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        parallel: int = 32,
        timeout_s: float = 600.0,
        retry_s: float = 60.0,
    ) -> None:
        self._url = urllib.parse.urlsplit(base_url.rstrip("/"))
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"base_url is {base_url!r}; it must be like http://127.0.0.1:8000/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s, self._retry_s = timeout_s, retry_s
        self._threads = ThreadPoolExecutor(parallel, "openai")
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._model = model

    @property
    def model_name(self) -> str:
        """What the model is called; asked of the server once."""
        if self._model is None:
            listed = self._request("GET", "/models", None)["data"]
            if not listed:
                raise ClientError(f"{self._where('/models')}: the server lists no model")
            self._model = str(listed[0]["id"])
        return self._model

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """See `Client`."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        answer = await self._post("/completions", {"prompt": given, **_fields(params)})
        return _completion(answer, lambda choice: choice["text"])

    async def chat(self, messages: Messages, params: SamplingParams) -> Completion:
        """See `Client`."""
        fields = {"messages": [dict(message) for message in messages], **_fields(params)}
        answer = await self._post("/chat/completions", fields)
        return _completion(answer, lambda choice: choice["message"]["content"] or "")

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Client`."""
        answer = await self._post("/embeddings", {"input": list(texts)})
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return np.asarray([row["embedding"] for row in rows], np.float32)

    async def score(self, text: str) -> list[TextToken]:
        """See `Client`; asks for a completion of no token that echoes its prompt."""
        fields = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0.0}
        found = (await self._post("/completions", fields))["choices"][0]["logprobs"]
        front = _put_in_front(text, found["tokens"])
        return [
            TextToken(
                max(offset - front, 0),
                logprob,
                logprob is not None and _is_likeliest(logprob, top),
            )
            for offset, logprob, top in zip(
                found["text_offset"], found["token_logprobs"], found["top_logprobs"], strict=True
            )
        ]

    def close(self) -> None:
        """See `Client`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for connection in self._connections:
            connection.close()

    async def _post(self, path: str, fields: Mapping[str, Any]) -> Any:
        loop = asyncio.get_running_loop()

        def ask() -> Any:
            return self._request("POST", path, {"model": self.model_name, **fields})

        return await loop.run_in_executor(self._threads, ask)

    def _request(self, method: str, path: str, body: Any) -> Any:
        """An answer's JSON; a busy server is asked again as it says, until `retry_s` are over."""
        content = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + self._retry_s
        for attempt in range(1 << 30):
            wait = min(0.5 * 2**attempt, 10.0)
            try:
                status, headers, text = self._send(method, path, content)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                problem, status = f"{type(error).__name__}: {error}", None
                if isinstance(error, socket.timeout):
                    raise ClientError(
                        f"{self._where(path)}: no answer in {self._timeout_s:g} s"
                    ) from error
            else:
                if status == 200:
                    return json.loads(text)
                problem = f"status {status}: {_message(text)}"
                if status not in BUSY:
                    raise ClientError(f"{self._where(path)}: {problem}", status)
                wait = _seconds(headers.get("Retry-After"), wait)
            if time.monotonic() + wait > deadline:
                raise ClientError(f"{self._where(path)}: {problem}", status)
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, content: bytes | None) -> tuple[int, Any, bytes]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            secure = self._url.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            connection = kind(self._url.hostname or "", self._url.port, timeout=self._timeout_s)
            self._local.connection = connection
            self._connections.append(connection)
        connection.request(method, self._url.path + path, content, self._headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
        self._local.connection = None

    def _where(self, path: str) -> str:
        return f"{urllib.parse.urlunsplit(self._url)}{path}"


def _fields(params: SamplingParams) -> dict[str, Any]:
    """What of the params is not a default, as a request's JSON."""
    changed = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            changed[field.name] = list(value) if isinstance(value, tuple) else value
    # Servers differ in what they take when nothing is said.
    return {"temperature": params.temperature, "max_tokens": params.max_tokens, **changed}


def _completion(answer: Mapping[str, Any], text_of: Any) -> Completion:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    usage = answer.get("usage") or {}
    return Completion(
        tuple(Choice(text_of(choice), choice["finish_reason"] or "error") for choice in choices),
        int(usage.get("prompt_tokens", 0)),
        int(usage.get("completion_tokens", 0)),
    )


def _put_in_front(text: str, tokens: Sequence[str]) -> int:
    """Characters of tokens that a server puts before a text, such as BOS."""
    front = 0
    for token in tokens:
        if text.startswith(token) or REPLACEMENT in token:
            return front
        front += len(token)
    return 0


def _is_likeliest(logprob: float, top: Mapping[str, float] | None) -> bool:
    return not top or logprob >= max(top.values())


def _seconds(header: str | None, otherwise: float) -> float:
    try:
        return otherwise if header is None else max(float(header), 0.0)
    except ValueError:
        return otherwise


def _message(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200].decode(errors="replace")
