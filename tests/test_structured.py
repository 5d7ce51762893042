"""Answers have the form that their request asks for, whatever else runs; over HTTP too."""

import asyncio
import dataclasses
import json
import logging
import random
import re
from typing import Literal

import jsonschema
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("openai")
from pydantic import BaseModel
from scripted_engine import connect, post, serving, wait_until
from tiny_engine import SETTINGS, TOKENIZER, checkpoint

from serving import Engine, ParameterError, SamplingParams, grammar

FORM = {"max_tokens": 44, "temperature": 1.3}
NO_SPACE = {32: -100.0, 10: -100.0}
OPEN = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)
CHAT = "/v1/chat/completions"
RAIN = {
    "type": "object",
    "properties": {"c": {"$ref": "#/$defs/City"}},
    "required": ["c"],
    "$defs": {"City": {"enum": ["O", "R"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "rain", "parameters": RAIN}},
    {"type": "function", "function": {"name": "time"}},
]
ASKED = {"messages": [{"role": "user", "content": "?"}], "model": "tiny"}


@pytest.fixture(scope="module")
def engine():
    files = TOKENIZER.files() | {"chat_template.jinja": b"{{ messages[-1].content }}"}
    return Engine(checkpoint(files), dataclasses.replace(SETTINGS, warm_up=True))


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as (url, _):
        assert engine.wait_ready(300)
        yield url


def forms(kind, values, **more):
    settings = {**FORM, **more}
    return [
        SamplingParams(structured_outputs={kind: value}, seed=i, **settings)
        for i, value in enumerate(values)
    ]


def schema(rng, inside=False):
    """A small schema, which a random model comes to the end of."""
    kind = rng.randrange(7 if inside else 12)
    simple = [
        {"enum": rng.sample(["a", "é", 7, None, False, "x y", -1.5], rng.randint(1, 4))},
        {"type": "integer", "minimum": rng.randint(-20, 0), "maximum": rng.randint(0, 300)},
        {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 4)},
        {"type": "string", "pattern": rng.choice(["^a[bc]{1,3}$", "^[0-9]{2}-x?$"])},
        {"type": ["boolean", "null"]},
        {"const": {"k": [1, "two"]}},
        {"type": "string", "format": rng.choice(["date", "ipv4"])},
    ]
    if kind < len(simple):
        return simple[kind]
    names = rng.sample(["a", "b", "name", "é"], 2)
    below = [schema(rng, inside=True) for _ in names]
    nested = [
        {
            "type": "object",
            "properties": dict(zip(names, below, strict=True)),
            "required": names[: rng.randint(0, 2)],
            "additionalProperties": False,
        },
        {"type": "array", "items": below[0], "maxItems": rng.randint(1, 2)},
        {"type": "array", "prefixItems": below, "items": False, "minItems": 2},
        {"anyOf": [*below, {"type": "null"}]},
        {"$defs": {"d": below[0]}, "type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 1},
    ]
    return nested[kind - len(simple)]


def test_json_is_of_its_schema_for_200_drawn_ones(url, engine):
    """In one crowd, with too few pages for it."""
    rng = random.Random(1)
    schemas = [schema(rng) for _ in range(200)]
    params = forms("json", schemas)
    params[::2] = [dataclasses.replace(each, logit_bias=NO_SPACE) for each in params[::2]]
    ended = 0
    for drawn, result in zip(schemas, engine.generate([[1, 2]] * 200, params), strict=True):
        if result.choices[0].finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(result.text), drawn)
    assert ended > 150
    assert engine.stats().preemptions
    assert engine.stats().pages_free == engine.stats().pages_total


def test_texts_are_of_their_regex_choice_and_grammar(url, engine):
    """A whole answer is, however it is drawn; one that is cut off begins so."""
    regexes = [r"\d{3}/[a-f]{1,9}", r"(yes|no)!?", r"[^a]{4}", "", r"é{2,3}", r"(?i)it \w{1,5}"]
    regexes *= 4
    params = forms("regex", regexes)
    params += [dataclasses.replace(each, temperature=0.0) for each in params[:6]]
    for each, result in zip(params, engine.generate([[3]] * 30, params), strict=True):
        assert re.fullmatch(each.structured_outputs.regex, result.text)
        assert result.choices[0].finish_reason == "stop"
    texts = ['a"b', "a/b\n", "\x7f|", "été", "a", "ab"]
    results = engine.generate([[3]] * 40, forms("choice", [texts] * 40))
    assert {result.text for result in results} <= set(texts)
    assert len({result.text for result in results}) > 3
    cut = engine.generate([[3]], forms("choice", [["été"]], max_tokens=2))[0].choices[0]
    whole = engine.generate([[3]], forms("choice", [["été"]], max_tokens=5))[0].choices[0]
    assert (cut.text, cut.finish_reason) == ("é", "length")
    assert (whole.text, whole.finish_reason) == ("été", "stop")
    lark = 'start: "<" (start | WORD) ">"\nWORD: /[a-z]{1,3}/'
    for result in engine.generate([[3]] * 5, forms("grammar", [lark] * 5)):
        if result.choices[0].finish_reason == "stop":
            depth = result.text.count("<")
            assert re.fullmatch(rf"<{{{depth}}}[a-z]{{1,3}}>{{{depth}}}", result.text)


def test_those_beside_get_what_they_get_alone_and_so_do_the_guided(url, engine):
    """With several choices, log-probabilities and biases, in steps sent ahead and not."""
    guided = forms("regex", ["[a-z]{3,20}", "[0-9 ]+x", "(ab|cd)*"], max_tokens=24)
    guided[0] = dataclasses.replace(guided[0], n=3, logit_bias={101: 3.0})
    guided[1] = dataclasses.replace(guided[1], logprobs=2, max_tokens=12)
    guided[2] = dataclasses.replace(guided[2], best_of=3, presence_penalty=0.5, top_p=0.9)
    free = [OPEN, dataclasses.replace(OPEN, temperature=0.0)]
    free.append(dataclasses.replace(OPEN, logprobs=3, seed=8))
    asked = [*free, *guided]
    prompts = [list(range(1, 3 + 4 * i)) for i in range(6)]
    together = engine.generate(prompts, asked)
    for prompt, params, result in zip(prompts, asked, together, strict=True):
        again = engine.generate([prompt], params)[0]
        assert [c.token_ids for c in again.choices] == [c.token_ids for c in result.choices]
        assert (result.choices[0].logprobs is None) == (params.logprobs is None)
    assert len({choice.text for choice in together[3].choices}) == 3
    settings = dataclasses.replace(engine.settings, async_scheduling=False, warm_up=False)
    with Engine(checkpoint(), settings) as waits:
        tokens = [result.token_ids for result in waits.generate(prompts, asked)]
    assert tokens == [result.token_ids for result in together]


def test_the_likeliest_allowed_token_is_taken_and_its_log_probability_is_the_models(url, engine):
    letters = ["q", "r", "s", "t"]
    params = forms("choice", [letters], temperature=0.0, logprobs=2, max_tokens=2)[0]
    for prompt in ([1, 2, 3], list(b"some text")):
        entry = engine.generate([prompt], params)[0].choices[0].logprobs[0]
        scores = {ord(c): engine.score([*prompt, ord(c)])[-1].logprob for c in letters}
        assert entry.token == max(scores, key=scores.__getitem__)
        assert entry.logprob == pytest.approx(scores[entry.token], abs=1e-5)


def test_what_ends_a_guided_answer(url, engine, caplog):
    def ask(regex, **more):
        found = engine.generate([[9]], forms("regex", [regex], **more))[0].choices[0]
        return found.text, found.finish_reason, found.stop_reason

    assert ask("ab", min_tokens=9) == ("ab", "stop", None)
    assert ask("a?", min_tokens=9, logit_bias={97: 100}) == ("a", "stop", None)
    assert ask("a*", ignore_eos=True, logit_bias={257: 100}) == ("", "stop", None)
    assert ask("abc", stop=["b"]) == ("a", "stop", "b")
    assert ask("abc", stop_token_ids=[98]) == ("a", "stop", 98)
    assert not caplog.records
    with caplog.at_level(logging.ERROR):
        assert ask("ab", bad_words=["b"]) == ("a", "stop", None)
        assert ask("a", allowed_token_ids=[98]) == ("", "stop", None)
    assert caplog.text.count("is in a dead end: no token may follow") == 2


def test_grammars_that_cannot_be_used_are_refused_by_name(url, engine, monkeypatch):
    def refused(message, **form):
        with pytest.raises(ParameterError, match=message):
            engine.generate([[1]], SamplingParams(structured_outputs=form, n=2, seed=1))

    monkeypatch.setattr(grammar, "COMPILE_S", 60.0)  # The machine may be busy.
    place = r'cannot be used: Unimplemented keys: \["not"\], at #/properties/a/items/not; it must'
    refused(place, json={"properties": {"a": {"items": {"not": {}}}}})
    refused("structured_outputs has a regex .*: look-around", regex="a(?=b)")
    refused('a grammar .* unknown name: "word"', grammar="start: word")
    refused("a json .* no text is of this form", json={"$ref": "#"})
    refused("exactly one of json, json_object, regex, choice, grammar", regex="a", choice=["a"])
    refused("has 70001 bytes; it must be at most 65536", regex="a" * 70001)
    refused("has a json that is not JSON", json="{")
    refused("has lark", lark="start: x")
    deep = "start: a0\n" + "\n".join(f'a{i}: "b" a{i + 1}' for i in range(3500)) + '\na3500: "x"'
    params = forms("grammar", [deep], max_tokens=3)
    assert engine.generate([[1]], params)[0].text == "bbb"
    silent = Engine(checkpoint(files={}), SETTINGS)

    async def submit():
        silent.submit([1], forms("regex", ["a"])[0])

    with pytest.raises(ParameterError, match="left out: the checkpoint's tokenizer has none"):
        asyncio.run(submit())
    silent.close()
    monkeypatch.setattr(grammar, "COMPILE_S", 0.05)
    slow = "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(30)) + '\nA30: "x"'
    refused("a grammar that cannot be used: takes more than 0.05 s to compile", grammar=slow)
    assert engine.stats().running + engine.stats().waiting == 0


def test_response_format_through_the_client(url):
    class Point(BaseModel):
        label: Literal["a", "b"]
        x: bool

    point = {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["x"],
        "additionalProperties": False,
    }
    described = {"type": "json_schema", "json_schema": {"name": "point", "schema": point}}
    with connect(url, timeout=120.0) as client:
        ask = client.chat.completions.create
        whole = ask(**ASKED, response_format=described, seed=1, temperature=1.0)
        assert whole.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(whole.choices[0].message.content), point)
        chunks = ask(**ASKED, response_format=described, seed=1, temperature=1.0, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        free = {"response_format": {"type": "text"}, "extra_body": {"ignore_eos": True}}
        plain = ask(**ASKED, **free, max_tokens=3)
        assert plain.choices[0].finish_reason == "length"
        older = {"guided_choice": ["red", "blue"]}
        assert ask(**ASKED, extra_body=older).choices[0].message.content in ("red", "blue")
        parsed = client.chat.completions.parse(
            **ASKED, response_format=Point, logit_bias=NO_SPACE, seed=3
        )
        assert isinstance(parsed.choices[0].message.parsed, Point)
        done = client.completions.create(
            model="tiny", prompt="?", extra_body={"structured_outputs": {"regex": "[ab]{4}"}}
        )
        assert re.fullmatch("[ab]{4}", done.choices[0].text)


def test_demanded_calls_through_the_client(url):
    """The schema's references hold within the list of calls; arguments are never empty."""
    named = {"type": "function", "function": {"name": "time"}}
    with connect(url, timeout=120.0) as client:
        ask = client.chat.completions.create
        for seed in range(4):
            once = {"parallel_tool_calls": False, "seed": seed, "tools": TOOLS}
            once["logit_bias"] = NO_SPACE
            said = ask(**ASKED, tool_choice="required", **once).choices[0]
            assert said.finish_reason == "tool_calls"
            (call,) = said.message.tool_calls
            told = json.loads(call.function.arguments)
            assert told == {} or (call.function.name == "rain" and told["c"] in ("O", "R"))
            assert said.message.content is None
            pieces = ask(**ASKED, tool_choice="required", stream=True, **once)
            parts = [part for chunk in pieces for part in chunk.choices[0].delta.tool_calls or ()]
            assert parts[0].function.name == call.function.name
            assert "".join(p.function.arguments for p in parts) == call.function.arguments
        said = ask(**ASKED, tool_choice=named, tools=TOOLS).choices[0]
        assert said.finish_reason == "stop"
        assert said.message.tool_calls[0].function.arguments == "{}"


WRONG = [
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"structured_outputs": {}}, "structured_outputs", "gives nothing"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "another form"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice", "'some'"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "tim"}}},
        "tool_choice",
        "rain, time",
    ),
    ({"tool_choice": "required"}, "tool_choice", "without tools"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
        "tools",
        "Unimplemented keys",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_wrong_forms_are_told_apart_from_failures(url, fields, param, words):
    for stream in (False, True):
        status, _, told = post(url, CHAT, {**ASKED, **fields, "stream": stream})
        assert status == 400
        assert told["error"]["param"] == param
        assert words in told["error"]["message"]


def test_grammars_compile_no_program_and_leave_nothing(url, engine):
    wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)
    stats = engine.stats()
    assert stats.compilations["serving"] == 0
    assert stats.pages_free == stats.pages_total
