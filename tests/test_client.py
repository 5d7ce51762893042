"""One protocol for a model in this process and behind a server: the same calls and answers."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest

pytest.importorskip("openai")
from scripted_engine import serving
from tiny_engine import TOKENIZER, engine_of

from evals import Generate, Loglikelihood, Remote, Rolling
from serving import SamplingParams
from serving.client import ClientError, EngineClient, OpenAIClient

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
DRAWN = SamplingParams(temperature=0.9, max_tokens=6, seed=5, n=2, stop=("e",))
TEXT = "a text to score, é"


@pytest.fixture(scope="module")
def clients():
    engine = engine_of()
    with serving(engine) as (url, _):
        both = {"engine": EngineClient(engine), "server": OpenAIClient(f"{url}/v1")}
        yield both
        both["server"].close()


@pytest.fixture(params=["engine", "server"])
def client(clients, request):
    return clients[request.param]


def ask(*calls):
    async def together():
        return await asyncio.gather(*calls)

    return asyncio.run(together())


def test_the_same_is_answered(client, clients):
    alone = clients["engine"].engine.generate(["Once", "upon"], GREEDY)
    first, second, drawn = ask(
        client.complete("Once", GREEDY),
        client.complete([int(i) for i in TOKENIZER.encode(["upon"])[0]], GREEDY),
        client.complete("Once", DRAWN),
    )
    assert client.model_name == "tiny"
    assert [first.text, second.text] == [result.text for result in alone]
    assert (first.prompt_tokens, first.completion_tokens) == (4, 6)
    assert first.choices[0].finish_reason == "length"
    [wanted] = clients["engine"].engine.generate(["Once"], DRAWN)
    assert [choice.text for choice in drawn.choices] == [c.text for c in wanted.choices]


def test_texts_are_scored_and_embedded(client, clients):
    [tokens], [vectors] = ask(client.score(TEXT)), ask(client.embed([TEXT, "b"]))
    entries = clients["engine"].engine.score(clients["engine"].engine.encode(TEXT))
    assert tokens[0].logprob is None
    assert [t.logprob for t in tokens[1:]] == pytest.approx([e.logprob for e in entries], abs=1e-5)
    assert [t.greedy for t in tokens[1:]] == [e.rank == 1 for e in entries]
    assert [t.offset for t in tokens[:17]] == list(range(17))
    assert vectors.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_what_is_wrong_is_said(client):
    with pytest.raises((ClientError, ValueError), match="template"):
        ask(client.chat([{"role": "user", "content": "Hello"}], GREEDY))
    with pytest.raises((ClientError, ValueError), match="context"):
        ask(client.complete("x" * 60, GREEDY))


def test_tasks_run_on_a_client(client, clients):
    remote = Remote(client)
    engine = clients["engine"].engine

    def answered(*requests):
        got = dict(pair for group in remote.answer(requests, {1}) for pair in group)
        assert sorted(got) == [i for i in range(len(requests)) if i != 1]
        return got

    one = answered(*[Loglikelihood("a text ", each) for each in ("one", "not asked", "two")])[0]
    entries = engine.score(engine.encode("a text one"))
    assert one.logprob == pytest.approx(sum(e.logprob for e in entries[-4:]), abs=1e-4)
    assert one.tokens == 4
    document = answered(Rolling(TEXT), Rolling("not asked"))[0]
    assert document.bytes == len(TEXT.encode())
    assert document.logprob < 0
    texts = answered(Generate("Once", max_tokens=6), Generate("not asked"))[0].texts
    assert texts == (engine.generate(["Once"], GREEDY)[0].text,)


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gone = OpenAIClient(f"http://127.0.0.1:{port}/v1", "m", retry_s=0.0)
    with pytest.raises(
        ClientError, match=rf"127\.0\.0\.1:{port}/v1/completions: ConnectionRefused"
    ):
        ask(gone.complete("x", GREEDY))
    with pytest.raises(ValueError, match="must be like http"):
        OpenAIClient("localhost:8000")
