"""A server that is killed, restarted, told to end, or left by all of its clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
from scripted_engine import connect, read, serving, wait_until  # noqa: E402
from tiny_engine import CONFIG, TOKENIZER, engine_of, params_of  # noqa: E402

from model.checkpoint import save  # noqa: E402

pytestmark = pytest.mark.slow
NEW, LONG_S = 20, 300.0
PROMPTS = [f"{'a prefix that many share'[: 3 + i]}{i}" for i in range(12)]


async def ask_and_vanish(url, body, gone):
    """Ask over a connection that breaks off when `gone` is set."""
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    sent = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {len(sent)}\r\n"
    writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + sent)
    await gone.wait()
    writer.transport.abort()


def test_fifty_clients_that_vanish_leave_nothing_running():
    engine = engine_of()
    body = {"max_tokens": NEW, "ignore_eos": True, "temperature": 1.0, "n": 2}

    def seen():
        stats = engine.stats()
        return sum(stats.finished.values()) + stats.running + stats.waiting

    async def vanish(url):
        gone = asyncio.Event()
        bodies = [
            {**body, "prompt": prompt, "stream": number % 2 == 0}
            for number, prompt in enumerate((PROMPTS * 5)[:50])
        ]
        asks = [asyncio.create_task(ask_and_vanish(url, each, gone)) for each in bodies]
        async with asyncio.timeout(LONG_S):
            while seen() < 100:
                await asyncio.sleep(0.005)
        gone.set()
        await asyncio.gather(*asks)

    with serving(engine) as (url, service):
        asyncio.run(vanish(url))
        wait_until(
            lambda: not (engine.stats().running or engine.stats().waiting or service.jobs),
            seconds=LONG_S,
        )
        stats = engine.stats()
        assert read(url + "/health")[0] == 200
    assert stats.pages_free == stats.pages_total
    assert stats.finished["abort"] > 0
    assert stats.finished["error"] == 0
    assert sum(stats.finished.values()) == 100


@contextlib.contextmanager
def program(folder, port=0):
    """`serve.py` of a checkpoint in a process of its own, and its URL, once it is ready."""
    root = Path(__file__).parent.parent
    flags = [f"--checkpoint={folder}", f"--port={port}", "--max-model-len=48", "--max-num-seqs=4"]
    flags += ["--max-num-batched-tokens=16", "--num-pages=12", "--page-size=4"]
    flags += ["--decode-sizes=4", "--chunk-sizes=16", "--page-widths=12"]
    flags += [f"--drain-timeout-s={LONG_S}"]
    process = subprocess.Popen(
        [sys.executable, str(root / "serve.py"), *flags],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = process.stdout.readline().strip().partition(" at ")[2].removesuffix("/v1")
        wait_until(lambda: read(url + "/ready")[0] == 200, seconds=LONG_S)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def stream(url, prompt):
    """The text of a long greedy answer, and what broke it off, if anything did."""
    text = ""
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0.0}
    try:
        with connect(url, timeout=LONG_S) as client:
            for chunk in client.completions.create(
                stream=True, extra_body={"ignore_eos": True}, **asked
            ):
                text += chunk.choices[0].text
    except Exception as error:  # In the middle of a stream it is the HTTP library's own.
        return text, error
    return text, None


def running(url):
    """How many answers the engine computes, by the metrics."""
    with urllib.request.urlopen(url + "/metrics", timeout=LONG_S) as answer:
        lines = answer.read().decode().splitlines()
    line = next(each for each in lines if each.startswith("sheaf:num_requests_running{"))
    return float(line.rsplit(" ", 1)[1])


def test_killed_it_comes_back_and_told_to_end_it_finishes_what_it_has(tmp_path):
    folder = save(tmp_path / "tiny", CONFIG, params_of(), TOKENIZER.files())
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as threads:
        with program(folder) as (process, url):
            right = dict(zip(PROMPTS, threads.map(stream, [url] * 12, PROMPTS), strict=True))
            assert [error for _, error in right.values()] == [None] * 12
            asked = [threads.submit(stream, url, prompt) for prompt in PROMPTS]
            wait_until(lambda: running(url), seconds=LONG_S)
            process.send_signal(signal.SIGKILL)
            broken = [each.result(LONG_S) for each in asked]
            assert process.wait(LONG_S) == -signal.SIGKILL
            assert any(error is not None for _, error in broken)
        with program(folder, int(url.rsplit(":", 1)[1])) as (process, url):
            asked = [threads.submit(stream, url, prompt) for prompt in PROMPTS]
            wait_until(lambda: running(url), seconds=LONG_S)
            process.send_signal(signal.SIGTERM)
            ended = [each.result(LONG_S) for each in asked]
            assert process.wait(LONG_S) == 0
    whole = {p: answer for p, answer in zip(PROMPTS, ended, strict=True) if answer[1] is None}
    assert whole
    assert whole == {prompt: right[prompt] for prompt in whole}
    for _, error in ended:  # Who came too late was told so, and nobody was cut off.
        assert error is None or isinstance(
            error, openai.InternalServerError | openai.APIConnectionError
        )
