"""A server in trouble: a thousand clients of all kinds, too little memory, a step that hangs."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import threading
from collections import Counter

import pytest
from scripted_engine import read, serving, wait_until
from test_serving_text_out import cut
from tiny_engine import CONFIG, TOKENIZER, engine_of, params_of

from model import generate
from serving import EngineStoppedError, SamplingParams

NEW, CLIENTS, MOST_BYTES = 12, 1000, 20_000
PROMPTS = [f"{'a prefix that many share'[: 3 + i]}{i}" for i in range(20)]
HALF = "POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 500\r\n\r\n{"


@pytest.fixture(scope="module")
def alone():
    """The greedy text of each prompt, from the model by itself."""
    ids = [list(prompt.encode()) for prompt in PROMPTS]
    options = {"max_new_tokens": NEW, "stop_tokens": (TOKENIZER.eos,)}
    made = generate(params_of(), ids, CONFIG, **options).lists()
    return {p: TOKENIZER.decode(row) for p, row in zip(PROMPTS, made, strict=True)}


@pytest.fixture
def many_files():
    """Room for both ends of every connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * CLIENTS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may have {hard} open files here; the test needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Client:
    """One connection, without a library that would be kind to the server."""

    def __init__(self, url):
        self.port = int(url.rsplit(":", 1)[1])

    async def ask(self, body, *, bite=None, leaves_after=None):
        """Status and body of the answer; None for a client that leaves after so many bytes.

        bite: bytes that a slow reader takes at a time.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=256)
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
        try:
            writer.write(head.encode() + sent)
            if leaves_after is not None:
                await reader.read(leaves_after)
                return None
            got = b""
            while piece := await reader.read(bite or 1 << 16):
                got += piece
                await asyncio.sleep(0.01 if bite else 0)
        finally:
            writer.transport.abort()
        head, _, rest = got.partition(b"\r\n\r\n")
        return int(head.split()[1]), _dechunked(head, rest)

    async def vanish(self):
        """Send half a request and go."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(HALF.encode())
        await writer.drain()
        writer.transport.abort()


def _dechunked(head, rest):
    if b"chunked" not in head.lower():
        return rest
    whole = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return whole


def joined(events):
    """Text and reasons of a stream."""
    lines = [line for line in events.decode().split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    text = "".join(choice["text"] for choice in choices)
    return text, choices[-1]["finish_reason"], choices[-1]["stop_reason"]


def stops_of(rng, text):
    """Up to three stop strings, most of them in the text."""
    found = []
    for _ in range(rng.randint(0, 3)):
        start = rng.randrange(len(text) + 1)
        found.append(text[start : start + rng.randint(1, 4)] or "zz")
    return found


async def one_of_many(url, rng, alone, counts):
    """One client's request; what is answered must be right."""
    client, prompt = Client(url), rng.choice(PROMPTS)
    body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0.0}
    kind = rng.choices(
        ["whole", "stream", "slow", "leaves", "vanishes", "malformed", "oversized"],
        [35, 30, 5, 15, 5, 5, 5],
    )[0]
    counts[kind] += 1
    await asyncio.sleep(rng.random())
    if kind == "vanishes":
        return await client.vanish()
    if kind == "leaves":
        body |= {"stream": rng.random() < 0.5, "n": rng.randint(1, 3), "temperature": 0.7}
        return await client.ask(body, leaves_after=rng.choice([0, 1, 300, 900]))
    if kind == "malformed":
        raw = json.dumps(body).encode()[: rng.randint(1, 40)]
        assert (await client.ask(raw))[0] == 400
        return None
    if kind == "oversized":
        assert (await client.ask({**body, "user": "x" * 2 * MOST_BYTES}))[0] == 413
        return None
    stops = stops_of(rng, alone[prompt])
    body |= {"stop": stops, "stream": kind != "whole"}
    while (got := await client.ask(body, bite=64 if kind == "slow" else None))[0] == 429:
        counts["refused"] += 1
        await asyncio.sleep(0.2 + rng.random())
    status, answer = got
    assert status == 200, answer
    if kind == "whole":
        choice = json.loads(answer)["choices"][0]
        found = choice["text"], choice["finish_reason"], choice["stop_reason"]
    else:
        found = joined(answer)
    text, stop = cut(alone[prompt], stops, include=False)
    assert (found[0], found[2]) == (text, stop), (prompt, stops)
    assert (found[1] == "stop") or stop is None
    return None


@pytest.mark.slow
def test_a_thousand_clients_of_all_kinds_get_right_answers_or_none(alone, many_files):
    """They come within a second; 700 may wait, and ten run where one fits for sure."""
    engine = engine_of(
        num_pages=12, max_num_seqs=10, decode_sizes=(10,), max_waiting=700, watermark=0.0
    )
    rngs = [random.Random(number) for number in range(CLIENTS)]
    counts = Counter()

    async def crowd(url):
        await asyncio.gather(*(one_of_many(url, rng, alone, counts) for rng in rngs))

    with serving(engine, max_body_bytes=MOST_BYTES) as (url, service):
        asyncio.run(crowd(url))
        wait_until(lambda: not (engine.stats().running or engine.stats().waiting or service.jobs))
        stats = engine.stats()
        assert read(url + "/health")[0] == 200
    assert stats.pages_free == stats.pages_total == 12
    assert stats.preemptions > 100
    assert stats.finished["error"] == 0
    assert stats.finished["abort"] > 0
    assert min(counts[kind] for kind in ("slow", "vanishes", "malformed", "oversized")) > 20
    assert stats.finished["stop"] + stats.finished["length"] >= counts["whole"] + counts["stream"]


def test_an_engine_whose_step_hangs_is_given_up(caplog):
    """The device never answers: health is bad, the end does not wait, and readers are told."""
    release = threading.Event()

    async def run():
        engine = engine_of(watchdog_s=0.3)
        engine._device.read = lambda sent: release.wait(60)
        engine.start()
        assert engine.wait_ready(60)
        answer = engine.submit([1], SamplingParams())
        while engine.healthy:
            await asyncio.sleep(0.02)
        assert not engine.ready
        await asyncio.wait_for(engine.stop(), 10)
        with pytest.raises(EngineStoppedError, match="a step took longer than"):
            await answer.all()
        return engine

    engine = asyncio.run(run())
    assert isinstance(engine.failure, TimeoutError)
    release.set()
    engine._loop._thread.join(10)
