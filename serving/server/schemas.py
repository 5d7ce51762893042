"""The bodies of requests, as the OpenAPI description shows them.

They check only shapes. What the fields of sampling may hold is checked where they are used
(`serving.fields`, `serving.sampling_params`), so that programs and HTTP get the same words.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Prompt = str | list[TokenId] | list[str] | list[list[TokenId]]


class Body(BaseModel):
    """A JSON object; fields that nobody knows are kept and named in a warning."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None

    def given(self) -> dict[str, Any]:
        """The fields that the request has."""
        return self.model_dump(exclude_unset=True)


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generation(Body):
    """What completions and chats share; the rest is `SamplingParams`."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = None
    max_tokens: StrictInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: StrictInt | None = None
    min_p: float | None = None
    seed: StrictInt | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: StrictInt | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: StrictInt | None = None
    priority: StrictInt | None = None
    cache_salt: str | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: StrictInt | None = None
    best_of: StrictInt | None = None
    suffix: str | None = None
    add_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False


class TextPart(BaseModel):
    """A part of a message; this server reads text only."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """A call that an earlier answer made; `arguments` is JSON text."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(BaseModel):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message; templates see further fields too."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class Conversation(Body):
    """Messages and how the template is to render them."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(Generation, Conversation):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: StrictInt | None = None
    logprobs: bool | None = None
    top_logprobs: StrictInt | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = None
    user: str | None = None


class ScoreRequest(Body):
    """`POST /v1/score`: pairs of a context and what may continue it, both texts or both ids."""

    input: list[tuple[str | list[TokenId], str | list[TokenId]]] = Field(min_length=1)
    user: str | None = None


class TokenizeRequest(Body):
    """`POST /tokenize`: a prompt, or the messages of a chat."""

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    tokens: list[TokenId]
