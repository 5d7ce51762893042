"""The server as OpenAI's own client sees it, over a real connection: answers and streams."""

from __future__ import annotations

import base64
import json
import urllib.request

import numpy as np
import pytest

pytest.importorskip("openai")
from scripted_engine import TEMPLATE, ScriptedEngine, connect, post, read, serving

from data.chat import ChatTemplate, encode_chat
from data.tokenizers import ByteTokenizer
from serving.server import ServerSettings, create_app

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
SCRIPT = {
    "Count": "one two three four",
    "Weather": f"Let me see. {CALL}{CALL}",
    "Broken": "<tool_call>{</tool_call>",
    "Long": "x" * 1500,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER = [{"role": "user", "content": "Count"}]
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def running():
    with serving(ScriptedEngine(SCRIPT), served_names=("m", "alias"), log_requests=True) as found:
        yield found


@pytest.fixture(scope="module")
def url(running):
    return running[0]


@pytest.fixture(scope="module")
def client(url):
    with connect(url) as found:
        yield found


def test_completions_of_several_prompts_come_in_order_with_their_usage(client):
    found = client.completions.create(
        model="m", prompt=["Count", "ab"], n=2, max_tokens=9, temperature=1.0
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices[:2]] == ["one two t"] * 2
    assert [choice.text for choice in found.choices[2:]] == ["2 tokens,"] * 2
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 36, 43)
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert (found.object, found.model) == ("text_completion", "m")


def test_prompts_may_be_ids_and_text_may_be_echoed(client):
    ids = list(b"Count")
    assert client.completions.create(model="m", prompt=ids).choices[0].text == "one two three fo"
    lists = client.completions.create(model="m", prompt=[ids, [65]], max_tokens=3, echo=True)
    assert [choice.text for choice in lists.choices] == ["Countone", "A1 t"]
    nothing = client.completions.create(model="m", prompt="Count", max_tokens=0, echo=True)
    assert nothing.choices[0].text == "Count"


def test_log_probabilities_of_prompt_and_answer_line_up_with_the_text(client):
    found = client.completions.create(
        model="m", prompt="Cé", max_tokens=1, echo=True, logprobs=1, temperature=0.0
    ).choices[0]
    shown = found.logprobs
    assert shown.token_logprobs == [None, -0.125, -0.125, -0.125]
    assert shown.top_logprobs[0] is None
    # What lm-eval goes by: the chosen token's number is the greatest one, to the last bit.
    assert all(max(top.values()) == -0.125 for top in shown.top_logprobs[1:])
    assert shown.tokens[0] == found.text[0]
    assert shown.text_offset[:2] == [0, 1]
    assert len(shown.tokens) == 4


def test_best_of_returns_the_likeliest_and_counts_all(client):
    found = client.completions.create(
        model="m", prompt="ab", best_of=3, n=1, max_tokens=4, temperature=1.0
    )
    assert len(found.choices) == 1
    assert found.choices[0].logprobs is None
    assert found.usage.completion_tokens == 12


def test_a_stop_string_ends_the_text_and_is_named(client):
    found = client.completions.create(model="m", prompt="Count", max_tokens=50, stop=["ree f"])
    assert found.choices[0].text == "one two th"
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].stop_reason == "ree f"


def test_chats_are_rendered_by_the_template_and_answered(client, running):
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Count <|eos|>"}]},
    ]
    found = client.chat.completions.create(
        model="alias", messages=messages, logprobs=True, top_logprobs=2
    )
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", "one two three four")
    assert found.choices[0].finish_reason == "stop"
    first = found.choices[0].logprobs.content[0]
    assert (first.token, first.bytes) == ("o", [111])
    assert [likely.token for likely in first.top_logprobs] == ["o", "p"]
    prompt, params = running[1].engine.seen[-1]
    # A special token that a user writes out is text; the template's own count.
    assert prompt.count(257) == 0
    assert prompt.count(256) == 3
    assert bytes(t for t in prompt if t < 256).startswith(b"system: Be brief\nuser: Count <|eos|>")
    assert params.temperature == 0.0
    assert found.model == "alias"


@pytest.mark.parametrize("prompt", ["Count", "hello"])
def test_a_streams_pieces_are_the_whole_answer(client, prompt):
    asked = {"model": "m", "n": 2, "max_tokens": 40, "temperature": 1.0, "stop": "thr"}
    asked |= {"logprobs": 1}
    whole = client.completions.create(prompt=[prompt, "b"], **asked)
    chunks = list(
        client.completions.create(
            prompt=[prompt, "b"], stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        offsets = [offset for c in mine for offset in c.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_a_chat_streams_who_speaks_then_the_text_then_the_end(client):
    chunks = list(
        client.chat.completions.create(model="m", messages=USER, stream=True, logprobs=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == "one two three four"
    assert deltas[-1].content is None
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    told = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert sum(map(len, told)) == len("one two three four") + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_tool_calls_come_whole_and_in_pieces(client):
    asked = {"model": "m", "messages": [{"role": "user", "content": "Weather"}], "tools": TOOLS}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    names = [call.function.name for call in choice.message.tool_calls]
    assert names == ["weather", "weather"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}

    chunks = list(client.chat.completions.create(stream=True, **asked))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas).strip() == "Let me see."
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    for index in (0, 1):
        first, *rest = [call for call in pieces if call.index == index]
        assert (first.function.name, first.function.arguments, first.type) == (
            "weather",
            "",
            "function",
        )
        assert json.loads("".join(call.function.arguments for call in rest)) == {"city": "Oslo"}
        assert all(call.id is None for call in rest)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert deltas[-1].model_dump(exclude_none=True) == {}
    one = client.chat.completions.create(parallel_tool_calls=False, **asked).choices[0]
    assert len(one.message.tool_calls) == 1

    history = [*asked["messages"], choice.message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": names[0], "content": "rain"}, *USER]
    again = client.chat.completions.create(model="m", messages=history, tools=TOOLS)
    assert again.choices[0].message.content == "one two three four"


def test_what_is_no_call_is_content(client):
    broken = [{"role": "user", "content": "Broken"}]
    found = client.chat.completions.create(model="m", messages=broken, tools=TOOLS).choices[0]
    assert found.message.content == SCRIPT["Broken"]
    assert (found.message.tool_calls, found.finish_reason) == (None, "stop")
    asked = {"model": "m", "messages": [{"role": "user", "content": "Weather"}]}
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = client.chat.completions.create(**asked, **more).choices[0]
        assert found.message.content == SCRIPT["Weather"]
        assert found.finish_reason == "stop"


def test_embeddings_come_as_numbers_and_as_base64(client, url):
    plain = client.embeddings.create(model="m", input=["a", "ab"], encoding_format="float")
    coded = client.embeddings.create(model="m", input=["a", "ab"])
    assert [e.embedding for e in plain.data] == [e.embedding for e in coded.data]
    np.testing.assert_allclose(plain.data[1].embedding[97:99], [0.5**0.5] * 2, rtol=1e-6)
    assert plain.usage.prompt_tokens == 3
    short = client.embeddings.create(model="m", input="ab", dimensions=98)
    np.testing.assert_allclose(np.linalg.norm(short.data[0].embedding), 1.0, rtol=1e-6)
    raw = post(url, "/v1/embeddings", {"input": [1, 2], "encoding_format": "base64"})[2]
    vector = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    assert vector.shape == (258,)


def test_models_tokens_and_versions_are_told(client, url):
    assert [model.id for model in client.models.list()] == ["m", "alias"]
    assert client.models.retrieve("alias").max_model_len == 2048
    told = post(url, "/tokenize", {"prompt": "é<|eos|>"})[2]
    assert told == {"count": 3, "max_model_len": 2048, "tokens": [195, 169, 257]}
    assert post(url, "/detokenize", {"tokens": told["tokens"]})[2] == {"prompt": "é<|eos|>"}
    chat = post(url, "/tokenize", {"messages": USER, "add_generation_prompt": False})[2]
    assert chat["count"] == len("0user: Count0")
    rendered = encode_chat(TOKENIZER, ChatTemplate(TEMPLATE), USER, add_generation_prompt=False)
    assert chat["tokens"] == rendered.tolist()
    assert read(url + "/tokenizer_info")[2]["eos_token"] == "<|eos|>"
    assert "version" in read(url + "/version")[2]
    assert read(url + "/openapi.json")[2]["info"]["title"] == "Sheaf"


def test_an_adapter_is_a_model_whose_parent_is_the_base():
    engine = ScriptedEngine(SCRIPT, adapters=("law", "tales"))
    with serving(engine, served_names=("m",), open_metrics=True) as (url, _), connect(url) as us:
        told = {model.id: model.parent for model in us.models.list()}
        assert told == {"m": None, "law": "m", "tales": "m"}
        for model in ("m", "tales"):
            assert us.completions.create(model=model, prompt="Count").model == model
        assert us.chat.completions.create(model="law", messages=USER).model == "law"
        assert engine.asked == [None, "tales", "law"]
        status, _, body = post(url, "/v1/completions", {"prompt": "Count", "model": "lore"})
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert "there is m, law, tales" in body["error"]["message"]
        with urllib.request.urlopen(url + "/metrics", timeout=20) as answer:
            assert b'running_lora_adapters="law"' in answer.read()
    with pytest.raises(ValueError, match="law is the name of the model and of an adapter"):
        create_app(engine, ServerSettings(served_names=("law",)))


def test_the_client_names_its_request_and_long_names_are_not_taken(url):
    body = {"prompt": "Count", "max_tokens": 1}
    assert post(url, "/v1/completions", body, **{"x-request-id": "r-1"})[1]["x-request-id"] == "r-1"
    given = post(url, "/v1/completions", body, **{"x-request-id": "x" * 999})[1]["x-request-id"]
    assert len(given) == 32


def test_continuations_are_scored_after_their_contexts(client, url):
    """The script says that every token has log-probability -1/8 and is the likeliest."""
    body = {"input": [["Count", " to"], [[65, 66], [67]], ["Count ", "to"]]}
    first, ids, spaced = post(url, "/v1/score", body)[2]["data"]
    assert first == {
        "object": "score", "index": 0, "logprob": -0.375, "tokens": list(b" to"),
        "token_logprobs": [-0.125] * 3, "is_greedy": True,
    }  # fmt: skip
    assert (ids["tokens"], ids["logprob"]) == ([67], -0.125)
    assert spaced["tokens"] == list(b" to")
    usage = post(url, "/v1/score", body)[2]["usage"]
    assert usage == {"prompt_tokens": 19, "total_tokens": 19}


def test_the_prefix_cache_is_emptied_only_when_nothing_runs(running, url):
    engine = running[1].engine
    assert post(url, "/reset_prefix_cache", {})[2] == {"status": "empty"}
    engine.running += 1
    status, headers, told = post(url, "/reset_prefix_cache", {})
    engine.running -= 1
    assert (status, told["error"]["type"]) == (409, "conflict_error")
    assert headers["retry-after"] == "1"
    assert "x-should-retry" not in headers


def test_pages_of_other_origins_may_call_only_if_told_so(url):
    head = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asks = urllib.request.Request(url + "/v1/completions", None, head, method="OPTIONS")
    assert read(asks)[0] == 405
    with serving(ScriptedEngine(), allowed_origins=("https://a.example",), api_keys=("k",)) as (
        open_url,
        _,
    ):
        asks = urllib.request.Request(open_url + "/v1/models", None, head, method="OPTIONS")
        with urllib.request.urlopen(asks, timeout=20) as answer:
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
        asks = urllib.request.Request(
            open_url + "/v1/models", None, {"Origin": "https://b.example"}
        )
        status, headers, _ = read(asks)
        assert status == 401
        assert "access-control-allow-origin" not in headers
