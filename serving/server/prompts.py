"""From what a request says to token ids, in threads: tokenizers and templates take their time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data.chat import ChatTemplate, encode_chat
from data.tokenizers import Tokenizer
from serving.server.errors import ApiError
from serving.server.schemas import Message, Tool

RESERVED = frozenset(
    (
        *("messages", "tools", "template", "tokenizer", "allow_special", "mark", "spans"),
        *("add_generation_prompt", "continue_final_message"),
    )
)
"""Names that `chat_template_kwargs` may not have: they mean something to the renderer itself."""


class Rendering(Protocol):
    """The fields that say how messages become text."""

    tools: list[Tool] | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: dict[str, Any] | None


async def encode_prompts(
    tokenizer: Tokenizer, given: Any, *, add_special_tokens: bool = True, param: str = "prompt"
) -> list[list[int]]:
    """Ids of each prompt of a text, texts, ids or lists of ids.

    Special tokens written in a text count: whoever sends a raw prompt writes all of it.
    """
    several = given if isinstance(given, list) and not _is_ids(given) else [given]
    if not several:
        raise ApiError(400, f"{param} is empty; it must have at least one", param=param)
    encoded = [
        await asyncio.to_thread(encode_text, tokenizer, one, add_special_tokens, param)
        if isinstance(one, str)
        else check_ids(tokenizer, one, param)
        for one in several
    ]
    for number, ids in enumerate(encoded):
        if not ids:
            which = f"{param}[{number}]" if len(encoded) > 1 else param
            raise ApiError(400, f"{which} has no tokens; it must have at least one", param=param)
    return encoded


def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool, param: str) -> list[int]:
    """Ids of a raw prompt."""
    try:
        if add_special_tokens:
            return tokenizer.encode_prompt(text, allow_special=True).tolist()
        return tokenizer.encode([text], allow_special=True)[0].tolist()
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> list[int]:
    """Ids that a client sent."""
    if (largest := max(ids, default=0)) >= tokenizer.vocab_size:
        right = f"ids in [0, {tokenizer.vocab_size})"
        raise ApiError(400, f"{param} names id {largest}; it must have {right}", param=param)
    return list(ids)


def check_lengths(texts: Sequence[Sequence[int]], longest: int) -> None:
    """Raise the error of an `input` that is longer than the model's context."""
    if (length := max(map(len, texts))) > longest:
        message = f"input has a text of {length} tokens; it must have at most {longest}"
        raise ApiError(400, message, param="input", code="context_length_exceeded")


async def encode_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    messages: Sequence[Message],
    how: Rendering,
    *,
    with_tools: bool = True,
) -> list[int]:
    """Ids of a conversation, as the model's template renders it."""
    if template is None:
        message = "this model has no chat template; use /v1/completions"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    variables = how.chat_template_kwargs or {}
    if wrong := sorted(RESERVED & variables.keys()):
        message = f"chat_template_kwargs may not have {', '.join(wrong)}"
        raise ApiError(400, message, param="chat_template_kwargs")
    knows_developer = any("developer" in text for text in template.templates.values())
    said = {
        "messages": [plain(message, knows_developer) for message in messages],
        "tools": [tool.model_dump(exclude_unset=True) for tool in how.tools or () if with_tools],
    }
    options = {
        "add_generation_prompt": how.add_generation_prompt and not how.continue_final_message,
        "continue_final_message": how.continue_final_message,
        **variables,
    }
    return await asyncio.to_thread(_render, tokenizer, template, said, options)


def _render(
    tokenizer: Tokenizer, template: ChatTemplate, said: dict[str, Any], options: dict[str, Any]
) -> list[int]:
    try:
        json.dumps([said, options], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    tools = said["tools"] or None
    return encode_chat(tokenizer, template, said["messages"], tools, **options).tolist()


def plain(message: Message, knows_developer: bool = False) -> dict[str, Any]:
    """A message as templates read it: content in one text, arguments of calls as objects."""
    shown = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        shown["content"] = "\n".join(part.text for part in message.content)
    if message.role == "developer" and not knows_developer:
        shown["role"] = "system"
    for call in shown.get("tool_calls") or ():
        call["function"]["arguments"] = _object(call["function"].get("arguments"))
    return shown


def _object(arguments: str | Mapping[str, Any] | None) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _is_ids(given: list[Any]) -> bool:
    return bool(given) and isinstance(given[0], int)
