"""What a request says of the form of its answer: `response_format`, `structured_outputs` and the
older names of vLLM, and tool calls that `tool_choice` demands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.checks import ParameterError
from serving.server.errors import ApiError
from serving.server.schemas import ChatRequest, Function, Tool
from serving.server.tools import Call, Part, call_of
from serving.structured import StructuredOutputs

FORM, FORMAT = "structured_outputs", "response_format"
OLDER = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""What vLLM called the forms before `structured_outputs`."""
_PLAIN = frozenset(
    ("type", "properties", "required", "title", "description", "$schema", "$defs", "$id")
)


def take_form(fields: dict[str, Any]) -> StructuredOutputs | None:
    """The form that a request's fields ask for; they are taken out. Raises `ParameterError` for
    more than one, or one that cannot be.
    """
    given = {name: fields.pop(name, None) for name in (FORM, FORMAT, *OLDER)}
    forms = [
        form
        for name, value in given.items()
        if value is not None and (form := _form(name, value)) is not None
    ]
    if len(forms) > 1:
        named = " and ".join(form.param for form in forms)
        raise ParameterError(forms[1].param, f"comes with another form ({named})", "the only one")
    return forms[0] if forms else None


def _form(name: str, value: Any) -> StructuredOutputs | None:
    if name in OLDER:
        return StructuredOutputs.of({OLDER[name]: value}, name)
    return StructuredOutputs.of(value) if name == FORM else _response_format(value)


def _response_format(given: Any) -> StructuredOutputs | None:
    kind = given.get("type", "text") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True, param=FORMAT)
    if kind != "json_schema":
        raise ParameterError(FORMAT, f"has type {kind!r}", "text, json_object or json_schema")
    described = given.get("json_schema")
    if not isinstance(described, Mapping) or described.get("schema") is None:
        raise ParameterError(FORMAT, "has no json_schema.schema", "given with type json_schema")
    return StructuredOutputs(json=described["schema"], param=FORMAT)


@dataclass(frozen=True)
class ForcedCalls:
    """Calls that a request demands.

    tools: of which. named: `tool_choice` names the one, and the answer is its arguments alone; else
    the answer is a list of calls. single: of one.
    """

    tools: Sequence[Tool]
    named: bool
    single: bool

    @property
    def form(self) -> StructuredOutputs:
        """The form of the answer. Raises `ParameterError` for schemas that cannot be."""
        functions = [tool.function for tool in self.tools]
        if self.named:
            return StructuredOutputs(json=arguments_schema(functions[0]), param="tools")
        calls = {"anyOf": [_call_schema(each, i) for i, each in enumerate(functions)]}
        most = {"maxItems": 1} if self.single else {}
        schema = {"type": "array", "minItems": 1, **most, "items": calls}
        return StructuredOutputs(json=schema, param="tools")

    def parser(self) -> ForcedParser:
        """What reads one answer."""
        names = frozenset(tool.function.name for tool in self.tools)
        return ForcedParser(names, self.tools[0].function.name if self.named else None)


def forced_calls(body: ChatRequest) -> ForcedCalls | None:
    """The calls that `tool_choice` demands; None where the model decides, or may not call. Raises
    what is wrong with it.
    """
    chosen, tools = body.tool_choice, body.tools or []
    if chosen in (None, "none", "auto"):
        if chosen == "auto" and not tools:
            raise _without_tools()
        return None
    if not tools:
        raise _without_tools()
    single = body.parallel_tool_calls is False
    if chosen == "required":
        return ForcedCalls(tools, named=False, single=single)
    named = chosen.get("function") if isinstance(chosen, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str):
        right = 'be "none", "auto", "required", or {"type": "function", "function": {"name": …}}'
        raise ApiError(400, f"tool_choice is {chosen!r}; it must {right}", param="tool_choice")
    found = [tool for tool in tools if tool.function.name == name]
    if not found:
        names = ", ".join(tool.function.name for tool in tools)
        message = f"tool_choice names {name!r}; it must name one of the tools, {names}"
        raise ApiError(400, message, param="tool_choice")
    return ForcedCalls(found[:1], named=True, single=True)


class ForcedParser:
    """Reads an answer that is nothing but calls: a list of them, each given as soon as it is
    complete, or the arguments of the one that was named.
    """

    def __init__(self, offered: frozenset[str], named: str | None) -> None:
        self._offered, self._named = offered, named
        self._text = ""

    def push(self, text: str) -> list[Part]:
        """Take the next text."""
        self._text += text
        if self._named is not None or "}" not in text:
            return []
        parts: list[Part] = []
        while (call := self._next()) is not None:
            parts.append(call)
        return parts

    def end(self) -> list[Part]:
        """The rest: text, where the answer was cut off."""
        text, self._text = self._text, ""
        if self._named is None:
            rest = text.strip("[], \n")
            return [rest] if rest else []
        try:
            value = {"name": self._named, "arguments": json.loads(text)}
        except (ValueError, RecursionError):
            value = None
        call = call_of(value, self._offered)
        return [call or text] if text else []

    def _next(self) -> Call | None:
        """The first call of the text, taken off; None while there is no whole one."""
        text = self._text.lstrip("[, \n")
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        call = call_of(value, self._offered)
        if call is not None:
            self._text = text[end:]
        return call


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments: an object, which has no keys but those described where
    the description is plain.
    """
    given = function.parameters or {"properties": {}}
    closed = {"additionalProperties": False} if given.keys() <= _PLAIN else {}
    return {"type": "object", **closed, **given}


def _call_schema(function: Function, number: int) -> dict[str, Any]:
    # With an id of its own, references such as #/$defs/City stay within the schema.
    arguments = {"$id": f"tool:{number}", **arguments_schema(function)}
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _without_tools() -> ApiError:
    message = "tool_choice is given without tools; it must come with at least one"
    return ApiError(400, message, param="tool_choice")
