"""The load generator: what it sends is what was asked for, and what it prints is what was there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
from scripted_engine import ScriptedEngine, serving, wait_until

from serving.__main__ import main
from serving.load import Lengths, Load, LoadSettings, Record, run, summarise
from serving.load.metrics import parse_counters
from serving.load.workload import draw, read_prompts

ROOT = Path(__file__).parents[1]


def run_load(**settings):
    """A load and its summary, with the most requests that were ever under way."""
    most = []
    load = Load(LoadSettings(**settings))
    asyncio.run(run(load, None, lambda load: most.append(load.under_way)))
    return load, summarise(load), max(most)


def test_lengths_and_times_follow_their_distributions_and_the_seed():
    rng = np.random.default_rng(0)
    assert Lengths.parse("n", "7").draw(3, rng) == [7, 7, 7]
    uniform = Lengths.parse("n", "uniform:2,5").draw(4000, rng)
    assert np.allclose(np.bincount(uniform)[2:] / 4000, 0.25, atol=0.03)
    logs = np.log(Lengths.parse("n", "lognormal:200,0.5").draw(4000, rng))
    assert np.median(logs) == pytest.approx(np.log(200), abs=0.04)
    assert np.std(logs) == pytest.approx(0.5, abs=0.02)
    settings = LoadSettings(requests=2000, rate=50.0, new_tokens="uniform:1,9", seed=3)
    gaps = np.diff([0.0, *(planned.at or 0.0 for planned in draw(settings))])
    assert np.mean(gaps) == pytest.approx(0.02, rel=0.1)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as an exponential's is
    assert draw(settings) == draw(settings)
    assert draw(settings) != draw(LoadSettings(requests=2000, rate=50.0, seed=4))


def test_shared_prefixes_are_as_long_and_as_many_as_asked_for():
    settings = LoadSettings(requests=64, prompt_tokens="40", shared_prefix=30, prefixes=3, ids=500)
    prompts = [planned.prompt for planned in draw(settings)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 3
    assert len({tuple(prompt) for prompt in prompts}) == 64
    words = draw(LoadSettings(requests=1, prompt_tokens="40"), tokens_per_word=4.0)[0].prompt
    assert len(words.split()) == 10


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"url": "localhost:8000"}, "http://127.0.0.1:8000"),
        ({"clients": 0}, "clients is 0"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"new_tokens": "uniform:9,2"}, "new_tokens is 'uniform:9,2'"),
        ({"prompt_tokens": "normal:9"}, "lognormal:128,0.5"),
        ({"prompt_tokens": "2.5"}, "prompt_tokens is '2.5'"),
        ({"chat": True, "ids": 9}, "ids is given with chat"),
    ],
)
def test_wrong_settings_say_what_would_be_right(wrong, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        LoadSettings(**wrong)


def test_prompts_of_a_file_are_sent_and_a_wrong_line_is_named(tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "one", "max_tokens": 3}\n\n{"prompt": [5, 6]}\n')
    assert read_prompts(good, [9, 8]) == [("one", 3), ([5, 6], 8)]
    for line in ("{}", "x", '{"prompt": ""}', '{"prompt": "a", "max_tokens": 0}', "[1]"):
        good.write_text('{"prompt": "one"}\n' + line)
        with pytest.raises(ValueError, match=r"good\.jsonl:2"):
            read_prompts(good, [1])


@pytest.mark.parametrize(
    "how", [{}, {"stream": False}, {"chat": True}, {"ids": 100, "rate": 200.0}]
)
def test_tokens_and_answers_are_those_that_the_server_counts(how):
    engine = ScriptedEngine({"": "words of an answer"}, pause=0.002)
    with serving(engine) as (url, _):
        load, summary, most = run_load(
            url=url + "/v1", requests=12, clients=3, new_tokens="uniform:3,9", **how
        )
    assert (summary.done, summary.failed, summary.errors) == (12, 0, {})
    assert sorted(record.index for record in load.records) == list(range(12))
    for record in load.records:
        assert record.completion_tokens == load.planned[record.index].max_tokens
        assert record.text == "words of an answer"[: record.completion_tokens]
        assert record.finish_reason == "length"
        assert len(record.times) == (0 if how.get("stream") is False else record.completion_tokens)
        assert record.times == sorted(record.times)
    # The server's own page, which was read by other code: E10 of the specification.
    assert summary.counts is not None
    assert all(here == there > 0 for here, there in summary.counts.values())
    assert most < 3 or "rate" in how


def test_figures_of_a_load_are_their_definitions():
    load = Load(LoadSettings(), planned=[None] * 4, seconds=10.0, busy_seconds=9.0)
    load.records = [
        Record(0, 3, 0.0, 2.0, [0.5, 1.0, 2.0], 10, 4, 3, True),
        Record(1, 1, 1.0, 2.0, [1.0], 20, 0, 1, True),
        Record(2, 5, 0.0, 9.0, [3.0], error="timeout"),
    ]
    summary = summarise(load)
    assert summary.first.percentiles == pytest.approx((0.75, 0.95, 0.995))
    assert summary.between.percentiles == pytest.approx(np.percentile([0.5, 1.0], (50, 90, 99)))
    assert summary.per_token.mean == pytest.approx(0.75)
    assert summary.whole.mean == pytest.approx(1.5)
    assert summary.speed.percentiles == pytest.approx((1.25, 1.05, 1.005))
    assert (summary.token_rate, summary.prompt_tokens, summary.cached_tokens) == (0.4, 30, 4)
    assert (summary.done, summary.failed, summary.planned) == (2, 1, 4)
    assert summary.errors == {"timeout": 1}
    assert summary.client == pytest.approx(0.9)


def test_counters_are_read_from_vllms_page_too():
    page = """# HELP vllm:prompt_tokens_total x
vllm:prompt_tokens_total{model_name="a b"} 7.0
vllm:generation_tokens_total{model_name="a"} 1e3
vllm:generation_tokens_created{model_name="a"} 1.7e9
vllm:request_success_total{finished_reason="stop"} 2.0
vllm:request_success_total{finished_reason="length"} 3.0
"""
    counters = parse_counters(page)
    assert counters.prompt_tokens == 7
    assert counters.generation_tokens == 1000
    assert counters.request_success == 5
    assert parse_counters("process_cpu_seconds_total 1.0") is None


def test_failures_are_counted_by_kind_and_cost_only_their_request(capsys):
    refusing = ScriptedEngine(most_waiting=0)
    with serving(refusing) as (url, _):
        status = main(["bench", f"--url={url}", "--requests=2", "--ids=50"])
    assert status == 1
    assert "failed: 2 x status 429, such as: 0 requests wait" in capsys.readouterr().out
    with serving(ScriptedEngine(breaks_at=2, breaks_alone=True)) as (url, _):
        _, summary, _ = run_load(url=url, requests=3, ids=50, new_tokens="uniform:1,4")
    assert summary.errors["error in the stream"] == summary.failed > 0
    with serving(ScriptedEngine(pause=0.5)) as (url, _):
        _, summary, _ = run_load(url=url, requests=1, ids=50, timeout_s=0.1)
    assert summary.errors == {"timeout": 1}


def test_a_server_that_is_not_there_or_wants_a_key_says_so(capsys, monkeypatch):
    monkeypatch.delenv("SHEAF_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["bench", "--url=http://127.0.0.1:1"]) == 2
    assert "no server at http://127.0.0.1:1" in capsys.readouterr().err
    with serving(ScriptedEngine(), api_keys=("secret",)) as (url, _):
        assert main(["bench", f"--url={url}", "--requests=1"]) == 2
        assert "answers 401" in capsys.readouterr().err
        monkeypatch.setenv("SHEAF_API_KEY", "secret")
        assert main(["bench", f"--url={url}", "--requests=1", "--new-tokens=2"]) == 0


@contextlib.asynccontextmanager
async def answering(*pieces):
    """A server of another make: what it sends for any request, piece by piece, then it closes."""

    async def one(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("pieces", "text", "error"),
    [
        ([b'data: {"choices": [{"text": "a"}]}\r\n\r\ndata: {"cho', b'ices": [{"text": "b"}]}\r\n',
          b"\r\ndata: [DONE]\r\n\r\n"], "ab", None),
        ([b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
          b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n',
          b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'], "a", None),
        ([b'data: {"choices": [{"text": "a"}]}\n\n'], "a", "cut off"),
        ([b"data: {nonsense}\n\n"], "", "not understood"),
    ],
)  # fmt: skip
def test_streams_of_other_servers_are_read_however_they_are_cut(pieces, text, error):
    async def whole():
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        async with answering(head, *pieces) as url:
            load = Load(LoadSettings(url=url, requests=1, ids=9, model="m"))
            await run(load, None, lambda load: None)
            return load.records[0]

    record = asyncio.run(whole())
    assert (record.text, record.error) == (text, error)
    assert record.counted is False
    if error is None:
        assert record.completion_tokens == len(record.times) == len(text)


def test_an_interrupted_load_prints_and_writes_what_there_is(tmp_path):
    # A test run in the background ignores the signal, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.svg"
    with serving(ScriptedEngine({"": "answer"}, pause=0.01)) as (url, _):
        command = [sys.executable, "-m", "serving", "bench", f"--url={url}", "--requests=100000",
                   "--ids=50", "--new-tokens=3", f"--out={out}", f"--plot={plot}"]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "COLUMNS": "100"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            try:
                wait_until(lambda: served(url) > 30, seconds=120)
                process.send_signal(signal.SIGINT)
                said, errors = process.communicate(timeout=120)
            finally:
                process.kill()
    assert process.returncode == 130, errors
    assert "time to first token, ms" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"{len(rows)} of 100000 requests answered" in said
    assert all(row["completion_tokens"] == 3 and len(row["times"]) == 3 for row in rows)
    assert plot.stat().st_size > 0


def served(url):
    """Answers that a server has counted."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as page:
        return parse_counters(page.read().decode()).request_success
