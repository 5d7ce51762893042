"""Chat templates: from messages to the text, and to the tokens, that a model was trained on.

A template is Jinja code that comes with the model's files. It runs in a process of its own, inside
a sandbox (data/chat_worker.py), with a deadline.

    template = ChatTemplate.from_files("models/some-chat-model")
    messages = [{"role": "user", "content": "Hello"}]
    ids = encode_chat(tokenizer, template, messages, add_generation_prompt=True)
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.chat_process import ChatProcess, WorkerError
from data.tokenizers import Tokenizer
from data.tokenizers.files import read_folder, tokenizer_files
from data.tokenizers.protocol import Ids
from data.tokenizers.settings import CONFIG, ROLES, read_json, read_settings, read_text
from weights import nearest

CHAT_TEMPLATE = "chat_template.jinja"
OLDER_CHAT_TEMPLATE = "chat_template.json"
SECONDS = 10.0
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_UNFINISHED = "\ufdd2unfinished "
Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
Marking = Callable[[str], str]


class ChatTemplateError(ValueError):
    """A template that is not there, fails or refuses, or messages that it cannot take."""


class ChatTemplate:
    """The chat templates of a model, by name; one called `default` is usual.

    Args:
        templates: a template, or several by name.
        special_tokens: texts that templates know as variables, such as `bos_token`.
        seconds: the time that a rendering may take.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
    ) -> None:
        self.templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.special_tokens = dict(special_tokens or {})
        self._process = ChatProcess(seconds)

    @staticmethod
    def from_files(source: str | os.PathLike | Mapping[str, bytes]) -> ChatTemplate:
        """The templates of a model's folder, or of a checkpoint's files.

        `chat_template.jinja` and `additional_chat_templates/NAME.jinja` (`NAME.jinja` in a
        checkpoint) stand above the `chat_template` of `tokenizer_config.json`. Raises
        `ChatTemplateError` if there is none.
        """
        files = tokenizer_files(source) if isinstance(source, Mapping) else read_folder(source)
        settings = read_settings(files)
        templates = _of_config(settings.config.get("chat_template"), CONFIG)
        if not templates:
            older = read_json(files, OLDER_CHAT_TEMPLATE).get("chat_template")
            templates = _of_config(older, OLDER_CHAT_TEMPLATE)
        for name in sorted(name for name in files if name.endswith(".jinja")):
            called = "default" if name == CHAT_TEMPLATE else name.removesuffix(".jinja")
            templates[called] = read_text(files, name)
        if not templates:
            raise ChatTemplateError(
                f"no chat template: needs {CHAT_TEMPLATE}, or chat_template in {CONFIG}; the files "
                f"are {', '.join(files) or 'none'}"
            )
        return ChatTemplate(templates, {k: v for k, v in settings.roles.items() if v})

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` makes it.

        Args:
            messages: objects with `role` and `content` and whatever else the template reads; an
                entry that is None counts as absent.
            tools: JSON schemas of functions.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end within the last message's `content` (or the entry named),
                so that the model goes on with it.
            template: the name of one; None takes `tool_use` if there are tools and it exists, else
                `default`.
            variables: what the template knows beside, in place of special tokens too.

        Raises `ChatTemplateError` with the template's name and line.
        """
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "template": template,
        }
        return self.render_marked(messages, tools, **options, **variables)[0]

    def render_marked(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        template: str | None = None,
        spans: bool = False,
        mark: Marking = str,
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """As `render`, with `mark` applied to every string of messages, tools and variables first.

        Also the characters `[start, stop)` of each generation block, if `spans`.
        """
        name = self._choose(template, bool(tools))
        conversation = _conversation(messages, mark)
        if continue_final_message:
            if add_generation_prompt or spans:
                other = "add_generation_prompt" if add_generation_prompt else "a mask"
                raise ChatTemplateError(f"continue_final_message and {other} exclude one another")
            entry = "content" if continue_final_message is True else continue_final_message
            final = _leave_open(conversation, entry, name, self.templates[name])
        given = {"documents": None, "tools": tools, **variables}
        known = {
            **self.special_tokens,
            **{k: _plain(v, k, str if k in ROLES else mark) for k, v in given.items()},
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
        }
        text, found = self._ask(name, known, spans)
        return (_cut(text, final, name) if continue_final_message else text), found

    def _choose(self, wanted: str | None, has_tools: bool) -> str:
        name = wanted or ("tool_use" if has_tools and "tool_use" in self.templates else "default")
        if name not in self.templates:
            raise ChatTemplateError(
                f"no chat template {name!r}; there are: {', '.join(self.templates)}"
                + (f"; nearest: {nearest(name, self.templates)}" if wanted else "")
            )
        return name

    def _ask(self, name: str, variables: Mapping[str, Any], spans: bool) -> tuple[str, list[Span]]:
        source = self.templates[name]
        if spans and not _GENERATION.search(source):
            raise ChatTemplateError(
                f"chat template {name!r} has no {{% generation %}} block, so it does not say which "
                "text is the assistant's"
            )
        request = {"template": source, "variables": variables, "spans": spans}
        try:
            answer = self._process.ask(request)
        except WorkerError as error:
            raise ChatTemplateError(f"chat template {name!r}: {error}") from error
        if "error" in answer:
            line = f", line {answer['line']}" if answer["line"] else ""
            raise ChatTemplateError(f"chat template {name!r}{line}: {answer['error']}")
        return answer["text"], [(start, stop) for start, stop in answer["spans"]]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    allow_special: bool = False,
    **options: Any,
) -> Ids:
    """Ids `int32[n]` of a conversation; `options` are those of `ChatTemplate.render`.

    Special tokens come from the template only: one that is written out in a message, a tool or a
    variable is ordinary text, so nobody can end a turn or begin one by writing it. With
    `allow_special` they count everywhere, as in transformers. Nothing is put in front: a template
    writes the `bos_token` itself.
    """
    return _encode(tokenizer, template, messages, tools, allow_special, options)[0]


def encode_chat_with_mask(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    allow_special: bool = False,
    **options: Any,
) -> tuple[Ids, np.ndarray]:
    """As `encode_chat`, with a mask `bool[n]` of the tokens that the assistant wrote.

    These are the tokens with a character inside the template's `{% generation %}` blocks. Raises
    `ChatTemplateError` if it has none.
    """
    options = {**options, "spans": True}
    ids, spans, written = _encode(tokenizer, template, messages, tools, allow_special, options)
    mask = np.zeros(len(ids), bool)
    for start, stop in written:
        mask |= (spans[:, 0] < stop) & (spans[:, 1] > start)
    return ids, mask


def _encode(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None,
    allow_special: bool,
    options: dict[str, Any],
) -> tuple[Ids, np.ndarray, list[Span]]:
    """Ids, the characters that each stands for, and the assistant's spans of characters."""
    roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    named = {role: tokenizer.decode([i]) for role, i in roles.items() if i is not None}
    options = {**{k: v for k, v in named.items() if k not in template.special_tokens}, **options}
    marks = _Marks([] if allow_special else tokenizer.special_tokens)
    text, written = template.render_marked(messages, tools, mark=marks, **options)
    parts = [text]
    if marks.made:
        parts = text.split(marks.secret)
        text, written = template.render_marked(messages, tools, **options)
        if "".join(parts) != text:
            raise ChatTemplateError(
                "a special token is written out in a message, and the template's text changes when "
                "it is kept apart; take it out, or let it count with allow_special=True"
            )
    ids, spans, start = [], [], 0
    for number, part in enumerate(parts):
        encoded = tokenizer.encode_with_spans(part, allow_special=True, continued=number > 0)
        ids.append(encoded[0])
        spans.append(encoded[1] + start)
        start += len(part)
    return np.concatenate(ids), np.concatenate(spans), written


class _Marks:
    """Puts a secret behind the first character of each special token that a string holds."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self.secret = f"\ufdd3{secrets.token_hex(8)}"
        self.made = 0
        names = [re.escape(name) for name in special_tokens if len(name) > 1]
        self._starts = re.compile(f"(?={'|'.join(names)})." if names else "(?!)", re.DOTALL)

    def __call__(self, text: str) -> str:
        marked, count = self._starts.subn(lambda match: match[0] + self.secret, text)
        self.made += count
        return marked


def _of_config(value: Any, file: str) -> dict[str, str]:
    """A file's `chat_template`: one, a list of objects with name and template, or none."""
    try:
        if isinstance(value, list):
            value = {entry["name"]: entry["template"] for entry in value}
        named = {"default": value} if isinstance(value, str) else dict(value or {})
        if all(isinstance(text, str) for text in named.values()):
            return named
    except (TypeError, KeyError, ValueError):
        named = {}
    raise ChatTemplateError(
        f"{file}: chat_template must be a text, or a list of objects with name and template"
    )


def _conversation(messages: Messages, mark: Marking) -> list[dict[str, Any]]:
    """Messages as plain data, without entries that are None."""
    if not messages:
        raise ChatTemplateError("messages is empty; a conversation has at least one")
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(
                f"messages[{number}] is {message!r}; it must be an object with role and content"
            )
        there = {key: value for key, value in message.items() if value is not None}
        plain.append(_with_reasoning(_plain(there, f"messages[{number}]", mark)))
    return plain


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message's reasoning under the names that templates know it by (as in transformers)."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, where: str, mark: Marking) -> Any:
    """The JSON value that a template sees, its strings marked."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {mark(str(k)): _plain(v, f"{where}.{k}", mark) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", mark) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    raise ChatTemplateError(
        f"{where} is of type {type(value).__name__}; templates take text, numbers, lists, objects"
    )


def _leave_open(conversation: list[dict[str, Any]], entry: str, name: str, template: str) -> str:
    """Put a tag behind the last message's text, in place; the text."""
    last = conversation[-1]
    if entry not in last or entry not in template:
        holder = "the last message" if entry not in last else f"chat template {name!r}"
        raise ChatTemplateError(f"continue_final_message: {holder} has no {entry!r}")
    if isinstance(last[entry], list):
        blocks = [block for block in last[entry] if isinstance(block, dict) and "text" in block]
        if not blocks:
            raise ChatTemplateError(f"continue_final_message: no text in the last {entry!r}")
        blocks[-1]["text"], text = blocks[-1]["text"] + _UNFINISHED, blocks[-1]["text"]
        return text
    names = _REASONING if entry in _REASONING else (entry,)
    text = last[entry]
    last.update({key: text + _UNFINISHED for key in names if last.get(key) == text})
    return text


def _cut(text: str, final: str, name: str) -> str:
    """The rendered text up to the tag; a template that trims its messages trims here too."""
    at = text.rfind(_UNFINISHED.strip())
    if at < 0 or final.strip() not in text:
        raise ChatTemplateError(
            f"chat template {name!r} does not keep the last message's text, so it has no end to go "
            "on from"
        )
    kept = text[at:].startswith(_UNFINISHED)
    return text[:at] if kept else text[:at].rstrip()
