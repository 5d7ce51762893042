"""serve.py: a checkpoint, the real engine and the server together, and the flags."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("openai")
from scripted_engine import connect, post, read, serving, wait_until
from tiny_engine import CONFIG, TOKENIZER, engine_of, params_of

import serve
from model.checkpoint import save
from serving import SamplingParams
from serving.command_line import parse
from sharding import MeshConfig

TEXT = "/v1/completions"
PROMPTS = [f"{'a prefix that many share'[: 5 + i]}{i}" for i in range(12)]


@pytest.fixture(scope="module")
def running():
    engine = engine_of(num_pages=13)
    with serving(engine) as (url, _):
        yield engine, url


def test_over_http_everybody_gets_what_the_engine_gives_in_process(running):
    engine, url = running
    greedy = SamplingParams(temperature=0.0, max_tokens=10)
    drawn = SamplingParams(temperature=1.1, top_p=0.9, max_tokens=10, seed=3, n=2)

    def asked(prompt):
        shared = {"model": "tiny", "prompt": prompt, "max_tokens": 10}
        whole = client.completions.create(temperature=0.0, **shared)
        more = {"temperature": 1.1, "top_p": 0.9, "seed": 3, "n": 2, "stream": True}
        texts = {0: "", 1: ""}
        for chunk in client.completions.create(**more, **shared):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return whole.choices[0].text, texts[0], texts[1]

    with connect(url) as client, concurrent.futures.ThreadPoolExecutor(6) as threads:
        got = list(threads.map(asked, PROMPTS))
    alone = [(*engine.generate([p], greedy), *engine.generate([p], drawn)) for p in PROMPTS]
    assert got == [(one.text, *(c.text for c in two.choices)) for one, two in alone]
    wait_until(lambda: engine.stats().pages_free == engine.stats().pages_total)


def test_scores_over_http_are_the_engines(running):
    engine, url = running
    ids = list(b"the words of a text")
    body = {"prompt": ids, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0.0}
    shown = post(url, TEXT, body)[2]["choices"][0]["logprobs"]
    assert shown["token_logprobs"][1:-1] == [each.logprob for each in engine.score(ids)]
    assert len(shown["tokens"]) == len(ids) + 1
    assert shown["token_logprobs"][-1] == max(shown["top_logprobs"][-1].values())
    pair = {"input": [[ids[:5], ids[5:]]]}
    (scored,) = post(url, "/v1/score", pair)[2]["data"]
    assert scored["token_logprobs"] == shown["token_logprobs"][5:-1]
    assert scored["logprob"] == pytest.approx(sum(scored["token_logprobs"]), rel=1e-9)
    vector = post(url, "/v1/embeddings", {"input": [ids]})[2]["data"][0]["embedding"]
    assert vector == engine.embed([ids])[0].tolist()


async def exchange(url, body, leaves_after=None):
    """The whole answer to a request, or None for a client that leaves after so many bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    head = "POST /v1/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    if leaves_after is None:
        got = await reader.read()
    else:
        got, _ = None, await reader.read(leaves_after)
    writer.transport.abort()
    return got and got.partition(b"\r\n\r\n")[2]


def test_a_crowd_that_comes_and_goes_leaves_no_page_and_no_wrong_answer(running):
    engine, url = running
    greedy = SamplingParams(temperature=0.0, max_tokens=10)
    alone = {p: r.text for p, r in zip(PROMPTS, engine.generate(PROMPTS, greedy), strict=True)}
    rng = random.Random(5)

    async def one(prompt):
        body = {"prompt": prompt, "max_tokens": 10, "temperature": 0.0}
        kind = rng.random()
        await asyncio.sleep(rng.random() * 0.5)
        if kind < 0.2:
            return await exchange(url, body | {"stream": True}, rng.choice([0, 200, 600]))
        if kind < 0.4:
            return await exchange(url, b"{" * rng.randint(1, 2000))
        whole = json.loads(await exchange(url, body))
        assert whole["choices"][0]["text"] == alone[prompt]
        return None

    async def crowd():
        await asyncio.gather(*(one(rng.choice(PROMPTS)) for _ in range(200)))

    asyncio.run(crowd())
    wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert engine.stats().pages_free == engine.stats().pages_total
    assert engine.stats().preemptions > 0


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 128, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.5, 1e-9]),
    st.sampled_from(["", "a", "\ud800", "\0", "é" * 50]),
    st.lists(st.sampled_from([0, 1, 257, 258, -1, "a", ""]), max_size=3),
    st.dictionaries(st.sampled_from(["1", "257", "258", "x", "type"]), st.integers(-200, 200)),
)
FIELDS = sorted(
    set(SamplingParams.__dataclass_fields__)
    | {"stream", "stream_options", "response_format", "add_special_tokens", "tools", "user"}
    | {"tool_choice", "top_logprobs", "max_completion_tokens", "prompt", "messages", "unknown"}
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_no_body_makes_the_server_fail(running, drawn):
    _, url = running
    body = {"prompt": "ab", "max_tokens": 2, "temperature": 0.5} | drawn
    if body.get("stream"):
        body["stream"] = False
    status, _, told = post(url, TEXT, body)
    assert status in (200, 400), told
    assert ("error" in told) == (status == 400)
    assert post(url, "/v1/chat/completions", {"messages": [{"role": "user"}], **drawn})[0] == 400


def test_flags_set_the_fields_of_the_settings(monkeypatch):
    monkeypatch.setenv("SHEAF_API_KEY", "from-outside")
    flags = (
        "--checkpoint=runs/x --port=0 --api-key=a --api-key=b --max-model-len=99 --mesh.tensor=2 "
        "--no-prefix-caching --decode-sizes=4,8 --policy=lpm --request-timeout-s=1.5 "
        "--served-name=m --tool-parser=mistral --adapter=law=a/b=c --adapter=tales=d"
    )
    command = parse(flags.split())
    assert command.checkpoint == "runs/x"
    assert command.server.api_keys == ("a", "b", "from-outside")
    assert (command.server.port, command.server.host) == (0, "127.0.0.1")
    assert command.server.served_names == ("m",)
    assert (command.engine.max_model_len, command.engine.prefix_caching) == (99, False)
    assert (command.engine.decode_sizes, command.engine.policy) == ((4, 8), "lpm")
    assert command.engine.request_timeout_s == 1.5
    assert command.mesh == MeshConfig(tensor=2)
    assert command.adapters == {"law": "a/b=c", "tales": "d"}
    assert parse(["--checkpoint=x"]).mesh is None


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for flag in ("--checkpoint", "--api-key", "--max-num-seqs", "--drain-timeout-s", "--mesh.data"):
        assert flag in text
    assert "how long requests may go on after SIGTERM" in " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint=no/such/folder"], "no/such/folder"),
        (["--checkpoint=x", "--tool-parser=hermez"], "hermes"),
        (["--checkpoint=x", "--port=70000"], "port is 70000"),
        (["--checkpoint=x", "--api-key="], "empty key"),
        (["--checkpoint=x", "--memory-fraction=2"], "memory_fraction is 2"),
        (["--checkpoint=x", "--adapter=law"], "--adapter=law: it must be NAME=FOLDER"),
        (["--checkpoint=x", "--adapter=a=b", "--adapter=a=c"], "an adapter a already"),
    ],
)
def test_wrong_input_is_one_line(flags, words, capsys):
    assert serve.main(flags) == 2
    told = capsys.readouterr().err
    assert told.startswith("serve.py: ")
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_the_program_serves_a_checkpoint_and_ends_at_a_signal(tmp_path):
    save(tmp_path / "tiny", CONFIG, params_of(), TOKENIZER.files())
    root = Path(__file__).parent.parent
    flags = [f"--checkpoint={tmp_path / 'tiny'}", "--port=0", "--max-model-len=32"]
    flags += ["--max-num-batched-tokens=16", "--max-num-seqs=2", "--num-pages=8"]
    flags += ["--decode-sizes=2", "--chunk-sizes=16", "--page-widths=2"]
    process = subprocess.Popen(
        [sys.executable, str(root / "serve.py"), *flags],
        env=os.environ | {"SHEAF_API_KEY": "k", "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        name, _, url = process.stdout.readline().strip().removesuffix("/v1").partition(" at ")
        assert name == "tiny"
        wait_until(lambda: read(url + "/ready")[0] == 200, seconds=120)
        with connect(url, api_key="k") as client:
            found = client.completions.create(model="tiny", prompt="ab", max_tokens=3)
        assert found.usage.completion_tokens == 3
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any(line.get("completion_tokens") == 3 for line in lines)
    assert '"ab"' not in log
