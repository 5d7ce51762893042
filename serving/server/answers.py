"""The bodies of answers, as the OpenAPI description shows them; the code builds plain objects, and
tests compare these with the description.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorInfo(BaseModel):
    """What is wrong: in words, by kind, the field, and a word that a program may go by."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorInfo


class CachedTokens(BaseModel):
    """How many tokens of the prompts were found in the cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and generated."""

    prompt_tokens: int
    total_tokens: int


class GenerationUsage(Usage):
    """The same of answers."""

    completion_tokens: int
    prompt_tokens_details: CachedTokens


class Logprobs(BaseModel):
    """One entry a token; the first of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A text; stop_reason: the stop string or id that ended it, or `timeout`."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class Answer(BaseModel):
    """What all answers begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: GenerationUsage


class Completion(Answer):
    """Texts that continue prompts: choice `prompt * n + i`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class LikelyToken(BaseModel):
    """A token with its log-probability; bytes are those of whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(LikelyToken):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[ChatToken]


class FunctionCall(BaseModel):
    """A call; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Said(BaseModel):
    """What the model says; calls are there only if it makes some."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    """A message."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class Chat(Answer):
    """Answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Embedding(BaseModel):
    """A vector of length 1, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Vectors of texts, in order."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Score(BaseModel):
    """How likely a continuation is: in sum, token by token, and whether each is the likeliest."""

    object: Literal["score"]
    index: int
    logprob: float
    tokens: list[int]
    token_logprobs: list[float]
    is_greedy: bool


class Scores(BaseModel):
    """Scores of pairs, in order."""

    object: Literal["list"]
    model: str
    data: list[Score]
    usage: Usage


class Model(BaseModel):
    """A name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """Ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """The text of ids."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Special tokens and the chat template, where the model has them."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Status(BaseModel):
    """In one word."""

    status: str


class Version(BaseModel):
    """Of the server."""

    version: str


def answered(model: type[BaseModel], *other: str) -> dict[int | str, dict[str, Any]]:
    """What a route answers, for its description; other: further media types."""
    return {200: {"model": model, "content": {name: {} for name in other}}}
