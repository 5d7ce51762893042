"""Tool calls: found in a model's text as it comes.

A parser takes text piece by piece and gives `str` for what is certainly content and `Call` for each
call that is complete. What looks like a call and is none, or names a function that was not offered,
is content.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Call:
    """A call of a function; arguments: the text of a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    @property
    def function(self) -> dict[str, str]:
        """As an answer shows it."""
        return {"name": self.name, "arguments": self.arguments}


Part = str | Call


class ToolParser(Protocol):
    """Parses one answer."""

    def push(self, text: str) -> list[Part]:
        """Take the next text."""
        ...

    def end(self) -> list[Part]:
        """The rest."""
        ...


class Hermes:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` within text (Hermes 2, Qwen 2.5)."""

    START, END = "<tool_call>", "</tool_call>"

    def __init__(self, offered: Collection[str]) -> None:
        self._offered = offered
        self._text = ""
        self._called = False

    def push(self, text: str) -> list[Part]:
        """Take the next text."""
        self._text += text
        parts: list[Part] = []
        while (start := self._text.find(self.START)) >= 0:
            end = self._text.find(self.END, start)
            if end < 0:
                return [*parts, *self._content(start)]
            parts += self._content(start)
            parts += self._call(end - start + len(self.END))
        length = len(self._text) - _begun(self._text, self.START)
        if self._called and not self._text[:length].strip():
            return parts  # A blank after a call waits for what it stands before.
        return parts + self._content(length)

    def end(self) -> list[Part]:
        """The rest; models of Hermes' format may end right after a call's object."""
        if self._text.startswith(self.START):
            return self._call(len(self._text))
        return self._content(len(self._text))

    def _call(self, length: int) -> list[Part]:
        raw, self._text = self._text[:length], self._text[length:]
        inner = raw.removeprefix(self.START).removesuffix(self.END)
        call = call_of(_json(inner), self._offered)
        self._called |= call is not None
        return [raw if call is None else call]

    def _content(self, length: int) -> list[Part]:
        """The text in front, without the blank between calls."""
        text, self._text = self._text[:length], self._text[length:]
        return [text] if text.strip() or (text and not self._called) else []


class Whole:
    """Formats in which all of an answer is calls: it is looked at once it is complete.

    opens: whether an answer that begins so, blanks taken off, may be calls; None while unknown.
    read: the calls of a whole answer as objects; anything else where it is none.
    """

    def __init__(
        self,
        offered: Collection[str],
        opens: Callable[[str], bool | None],
        read: Callable[[str], Any],
    ) -> None:
        self._offered, self._opens, self._read = offered, opens, read
        self._text = ""
        self._may_call = True

    def push(self, text: str) -> list[Part]:
        """Take the next text."""
        self._text += text
        begun = self._text.lstrip()
        if self._may_call and (not begun or self._opens(begun) is not False):
            return []
        self._may_call = False
        text, self._text = self._text, ""
        return [text] if text else []

    def end(self) -> list[Part]:
        """The calls, or the text."""
        text, self._text = self._text, ""
        values = self._read(text.strip()) if self._may_call else None
        calls = [call_of(value, self._offered) for value in _list(values)]
        found = [call for call in calls if call is not None]
        if found and len(found) == len(calls):
            return list(found)
        return [text] if text else []


def call_of(value: Any, offered: Collection[str]) -> Call | None:
    """The call that an object with `name` and `arguments` (or `parameters`) stands for."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    if name not in offered:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    try:
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:
        return None


def hermes(offered: Collection[str]) -> ToolParser:
    """Hermes 2 Pro, Qwen 2.5 and others."""
    return Hermes(offered)


def llama3_json(offered: Collection[str]) -> ToolParser:
    """Llama 3.1: `{"name": …, "parameters": {…}}`, several parted by `;`."""
    tag = "<|python_tag|>"

    def opens(text: str) -> bool | None:
        return text.startswith("{") or _starts(text, tag)

    def read(text: str) -> Any:
        return _values(text.removeprefix(tag), ";")

    return Whole(offered, opens, read)


def pythonic(offered: Collection[str]) -> ToolParser:
    """Llama 3.2 and 4: `[f(a=1), g()]`."""
    return Whole(offered, lambda text: text.startswith("["), _python_calls)


def mistral(offered: Collection[str]) -> ToolParser:
    """Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, later `[TOOL_CALLS]name[ARGS]{…}`."""
    tag = "[TOOL_CALLS]"

    def read(text: str) -> Any:
        if (listed := _json(text.removeprefix(tag))) is not None:
            return listed
        found = [
            re.fullmatch(r"\s*([\w.-]+)(?:\[ARGS\])?\s*(\{.*\})\s*", part, re.DOTALL)
            for part in text.split(tag)[1:]
        ]
        return [m and {"name": m[1], "arguments": _json(m[2])} for m in found]

    return Whole(offered, lambda text: _starts(text, tag), read)


TOOL_PARSERS: dict[str, Callable[[Collection[str]], ToolParser]] = {
    "hermes": hermes,
    "llama3_json": llama3_json,
    "pythonic": pythonic,
    "mistral": mistral,
}
SPECIAL_MARKS = {"llama3_json": ("<|python_tag|>",), "mistral": ("[TOOL_CALLS]", "[ARGS]")}
"""Marks that may be special tokens, which must then stay in the text that a parser gets."""


def _starts(text: str, tag: str) -> bool | None:
    """Whether a text starts with a tag; None while it may still."""
    return True if text.startswith(tag) else (None if tag.startswith(text) else False)


def _begun(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((n for n in lengths if tag.startswith(text[-n:])), 0)


def _list(values: Any) -> Sequence[Any]:
    return values if isinstance(values, list) else [values]


def _json(text: str) -> Any:
    """The JSON value; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _values(text: str, separator: str) -> list[Any] | None:
    """JSON values, parted; None where they are none."""
    values, decoder, text = [], json.JSONDecoder(), text.strip()
    while True:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        text = text[end:].strip()
        if not text:
            return values
        if not text.startswith(separator):
            return None
        text = text.removeprefix(separator).strip()


def _python_calls(text: str) -> list[dict[str, Any]] | None:
    """A Python list of calls with literal arguments; None where it is none."""
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_python_call(node) for node in tree.elts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("not a call with named arguments")
    arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    return {"name": ast.unparse(node.func), "arguments": arguments}
