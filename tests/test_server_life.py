"""Clients that leave, engines that fail, servers that end, and what operators see of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

openai = pytest.importorskip("openai")
from scripted_engine import ScriptedEngine, connect, post, read, serving, wait_until  # noqa: E402

TEXT = "/v1/completions"
SCRIPT = {"Count": "one two three four", "Long": "x" * 1500}
P = {"prompt": "a"}


def test_clients_that_vanish_leave_nothing_behind():
    engine = ScriptedEngine(SCRIPT, pause=0.01, slots=8)
    with serving(engine) as (url, service):
        port = int(url.rsplit(":", 1)[1])
        raw = []
        for number in range(30):
            body = json.dumps(
                {
                    "prompt": "Long",
                    "max_tokens": 1000,
                    "n": 2,
                    "temperature": 1.0,
                    "stream": number % 2 == 0,
                }
            ).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {len(body)}\r\n"
            raw.append(socket.create_connection(("127.0.0.1", port)))
            raw[-1].sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        wait_until(lambda: engine.running == 8 and engine.running + engine.waiting == 60)
        for number, connection in enumerate(raw):
            if number % 3 == 0:  # a reset rather than a goodbye
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()
        wait_until(lambda: not (engine.running or engine.waiting or service.jobs))
        assert engine.finished == {"abort": 60}
        assert post(url, TEXT, {"prompt": "ab", "max_tokens": 3})[2]["choices"][0]["text"] == "2 t"


def test_a_failure_in_a_stream_is_an_event_and_then_health_is_bad():
    engine = ScriptedEngine(SCRIPT, breaks_at=5)
    with serving(engine) as (url, service), connect(url) as client:
        stream = client.completions.create(model="scripted", prompt="Count", stream=True)
        assert "".join(next(stream).choices[0].text for _ in range(5)) == "one t"
        with pytest.raises(openai.APIError) as caught:
            next(stream)
        assert caught.value.body["code"] == "server_error"
        assert read(url + "/health")[0] == 503
        assert read(url + "/ready")[0] == 503
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="scripted", prompt="Count")
        assert caught.value.status_code == 503
        assert not service.jobs


def test_a_request_that_fails_alone_is_an_error_and_others_go_on():
    engine = ScriptedEngine(SCRIPT, breaks_at=0, breaks_alone=True)
    with serving(engine) as (url, _):
        for stream in (False, True):
            status, _, told = post(url, TEXT, {"prompt": "Count", "stream": stream})
            assert (status, told["error"]["code"]) == (503, "queue_timeout")
        engine.breaks_at = None
        assert post(url, TEXT, {"prompt": "Count"})[0] == 200


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(caplog):
    engine = ScriptedEngine(SCRIPT)
    engine.submit = lambda *args, **more: 1 / 0
    with serving(engine) as (url, service), caplog.at_level(logging.ERROR, "sheaf.server"):
        status, headers, told = post(url, TEXT, P)
        assert (status, told["error"]["type"]) == (500, "server_error")
        assert "zero" not in told["error"]["message"]
        assert headers["x-request-id"] in caplog.text
        assert "ZeroDivisionError" in caplog.text
        assert not service.jobs


def test_a_silent_stream_is_kept_alive_by_comments():
    engine = ScriptedEngine({"Slow": "ab"}, pause=0.25)
    with serving(engine, ping_s=0.05) as (url, _):
        body = json.dumps({"prompt": "Slow", "max_tokens": 2, "stream": True}).encode()
        request = urllib.request.Request(url + TEXT, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            lines = answer.read().decode().split("\n\n")
    assert ": ping" in lines
    assert lines[-2:] == ["data: [DONE]", ""]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"


def test_a_server_that_starts_or_drains_is_not_ready():
    engine = ScriptedEngine(SCRIPT, ready=False)
    with serving(engine) as (url, service):
        assert read(url + "/ready")[0] == 503
        assert read(url + "/health")[0] == 200
        status, headers, _ = post(url, TEXT, P)
        assert (status, headers["retry-after"]) == (503, "5")
        engine.ready = True
        assert read(url + "/ready")[0] == 200
        service.draining = True
        assert read(url + "/ready")[0] == 503
        assert post(url, TEXT, P)[2]["error"]["code"] == "service_unavailable"


@contextlib.contextmanager
def program(pause, drain):
    """A server in a process of its own, for signals; gives it and its URL."""
    code = (
        "from scripted_engine import ScriptedEngine\n"
        "from serving.server import ServerSettings, create_app, run\n"
        "import sys\n"
        f"engine = ScriptedEngine({{'Long': 'x' * 400}}, pause={pause})\n"
        f"settings = ServerSettings(port=0, drain_timeout_s={drain})\n"
        "sys.exit(run(create_app(engine, settings), lambda url: print(url, flush=True)))\n"
    )
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_requests_end_and_takes_no_new_ones():
    with program(pause=0.005, drain=20) as (process, url), connect(url) as client:
        asked = {"model": "scripted", "prompt": "Long", "max_tokens": 200}
        stream = client.completions.create(stream=True, **asked)
        texts = [next(stream).choices[0].text]
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: read(url + "/ready")[0] == 503)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**asked)
        assert caught.value.code == "service_unavailable"
        texts += [chunk.choices[0].text for chunk in stream]
        assert "".join(texts) == "x" * 200
        client.close()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("again", [False, True])
def test_the_end_of_patience_is_an_error_in_the_stream(again):
    with program(pause=0.02, drain=60 if again else 0.1) as (process, url), connect(url) as client:
        stream = client.completions.create(
            model="scripted", prompt="Long", max_tokens=400, stream=True
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        if again:
            wait_until(lambda: read(url + "/ready")[0] == 503)
            process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            list(stream)
        client.close()
        assert process.wait(timeout=60) == 3


# -- what operators see


def test_metrics_have_the_names_and_numbers_that_dashboards_know():
    with serving(ScriptedEngine(SCRIPT), metrics_prefix="vllm", open_metrics=True) as (url, _):
        post(url, TEXT, {"prompt": "Count", "max_tokens": 4})
        with urllib.request.urlopen(url + "/metrics", timeout=20) as answer:
            text = answer.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "scripted"
            key = sample.labels.get("finished_reason") or sample.labels.get("le") or ""
            samples[sample.name, key] = sample.value
    assert samples["vllm:request_success_total", "length"] == 1
    assert samples["vllm:generation_tokens_total", ""] == 4
    assert samples["vllm:kv_cache_usage_perc", ""] == 0.25
    assert samples["vllm:num_requests_running", ""] == 0
    assert samples["vllm:step_seconds_bucket", "0.1"] == 2
    assert (
        samples["vllm:step_seconds_bucket", "+Inf"] == samples["vllm:step_seconds_count", ""] == 4
    )
    assert samples["vllm:step_seconds_sum", ""] == 5.5


@pytest.mark.parametrize("shown", [False, True])
def test_logs_hold_what_people_wrote_only_if_asked_for(caplog, shown):
    with (
        serving(ScriptedEngine(SCRIPT), log_requests=shown) as (url, _),
        caplog.at_level(logging.DEBUG, "sheaf.server"),
    ):
        body = {"prompt": "Count", "max_tokens": 3, "unknown_field": "Count"}
        sent = post(url, TEXT, body)[1]["x-request-id"]
        wait_until(lambda: any(r.getMessage() == "request" for r in caplog.records))
    fields = next(r.fields for r in caplog.records if r.getMessage() == "request")
    assert (fields["request_id"], fields["status"], fields["path"]) == (sent, 200, TEXT)
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (5, 3)
    assert fields["finish_reasons"] == ["length"]
    assert fields.get("prompts") == (["Count"] if shown else None)
    assert fields.get("answers") == (["one"] if shown else None)
    everything = caplog.text + str([vars(record) for record in caplog.records])
    assert ("Count" in everything) == shown
    assert "unknown_field" in caplog.text
