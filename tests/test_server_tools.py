"""Tool calls are found in whatever pieces a text comes, and nothing else is taken for one."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.server.structured import ForcedParser
from serving.server.tools import TOOL_PARSERS, Call

OFFERED = frozenset(("weather", "clock"))
OSLO, NOW = ("weather", {"city": "Oslo", "days": [1, 2]}), ("clock", {})
HERMES = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}</tool_call>'
)
FOUND = {
    "hermes": {
        HERMES: [OSLO],
        f'I look.{HERMES}\n<tool_call>{{"name": "clock"}}</tool_call>\n': ["I look.", OSLO, NOW],
        HERMES.removesuffix("</tool_call>"): [OSLO],
        '<tool_call>{"name": "clock", "arguments": "{}"}</tool_call> done': [NOW, " done"],
    },
    "llama3_json": {
        '{"name": "weather", "parameters": {"city": "Oslo", "days": [1, 2]}}': [OSLO],
        '<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "clock"}': [NOW, NOW],
    },
    "pythonic": {"[weather(city='Oslo', days=[1, 2]), clock()]": [OSLO, NOW]},
    "mistral": {
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}]': [OSLO],
        '[TOOL_CALLS]clock[ARGS]{}[TOOL_CALLS]clock{"a": 1}': [NOW, ("clock", {"a": 1})],
    },
}
CONTENT = {
    "hermes": [
        "",
        "plain <tool and < more",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": ["clock"]}</tool_call>',
        "<tool_call><tool_call></tool_call>",
    ],
    "llama3_json": ["{", '{"a": 1}', '{"name": "rm", "parameters": {}}', "<|python", "{}{}", " x"],
    "pythonic": ["[", "[1, 2]", "[clock(1)]", "[rm()]", "[clock(a=b())]", "[]", "[" * 300],
    "mistral": ["[TOOL", "[TOOL_CALLS]", "[TOOL_CALLS]rm[ARGS]{}", "[1]", "[TOOL_CALLS]clock{"],
}


def parsed(name, pieces):
    parser = TOOL_PARSERS[name](OFFERED)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return parts + parser.end()


def told(parts):
    """Texts joined; calls as name and arguments."""
    joined = []
    for part in parts:
        if isinstance(part, Call):
            joined.append((part.name, json.loads(part.arguments)))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def cut(text, places):
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_calls_are_found_in_whatever_pieces_they_come(data):
    name = data.draw(st.sampled_from(sorted(FOUND)))
    text, expected = data.draw(st.sampled_from(sorted(FOUND[name].items())))
    pieces = cut(text, data.draw(st.lists(st.integers(0, 200), max_size=12)))
    assert told(parsed(name, pieces)) == expected


def test_a_blank_after_a_call_is_kept_with_the_text_behind_it():
    text, expected = next(item for item in FOUND["hermes"].items() if item[0].endswith(" done"))
    for place in range(len(text)):
        assert told(parsed("hermes", [text[:place], text[place:]])) == expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_no_call_stays_text_without_a_change(data):
    name = data.draw(st.sampled_from(sorted(CONTENT)))
    drawn = st.text(alphabet='<tool_cal>/{}[]"x ', max_size=40)
    text = data.draw(st.one_of(st.sampled_from(CONTENT[name]), drawn))
    pieces = cut(text, data.draw(st.lists(st.integers(0, 200), max_size=12)))
    assert "".join(told(parsed(name, pieces))) == text


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_text_without_a_call_streams_as_it_comes(name):
    parser = TOOL_PARSERS[name](OFFERED)
    assert "".join(map(str, parser.push("The answer "))) == "The answer "
    assert parser.push("is 4.") == ["is 4."]


FORCED = [
    ('[ {"name": "weather", "arguments": {"city": "}{]["}},\n{"name":"clock","arguments":{}}\n]',
     None, [("weather", {"city": "}{]["}), NOW]),
    ('[{"name": "clock", "arguments": {}}, {"name": "weather", "argum', None,
     [NOW, '{"name": "weather", "argum']),
    ('{"city": "Oslo", "days": [1, 2]}', "weather", [OSLO]),
    ("{}", "clock", [NOW]),
    ('{"city": "Os', "weather", ['{"city": "Os']),
    ("", "clock", []),
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORCED), st.lists(st.integers(0, 200), max_size=12))
def test_demanded_calls_are_read_in_whatever_pieces_they_come(case, places):
    """What is cut off stays text."""
    text, named, expected = case
    parser = ForcedParser(OFFERED, named)
    parts = [part for piece in cut(text, places) for part in parser.push(piece)]
    assert told(parts + parser.end()) == expected


def test_demanded_calls_are_given_one_by_one():
    parser = ForcedParser(OFFERED, None)
    (call,) = parser.push('[{"name": "clock", "arguments": {}}')
    assert call.function == {"name": "clock", "arguments": "{}"}
    assert parser.push(", ") == []


def test_ids_of_calls_differ():
    first, second = parsed("hermes", [HERMES + HERMES])
    assert first.id != second.id
    assert first.id.startswith("call_")
    assert len(first.id) == len("call_") + 24
