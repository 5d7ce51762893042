"""What a server says to wrong requests, and to those that must not come in: OpenAI's errors."""

from __future__ import annotations

import socket
import threading

import pytest

openai = pytest.importorskip("openai")
from scripted_engine import ScriptedEngine, connect, post, read, serving, wait_until  # noqa: E402

SCRIPT = {"Count": "one two three four"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER = [{"role": "user", "content": "Count"}]


@pytest.fixture(scope="module")
def url():
    with serving(ScriptedEngine(SCRIPT)) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url):
    with connect(url) as found:
        yield found


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
P = {"prompt": "a"}
M = {"messages": USER}
WRONG = [
    (TEXT, b"{", 400, None, "invalid_json"),
    (TEXT, b"[" * 100_000, 400, None, None),
    (TEXT, b'"text"', 400, None, None),
    (TEXT, {}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": 7}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": []}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": ""}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": ["a", ""]}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": [[-1]]}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": [258]}, 400, "prompt", "invalid_value"),
    (TEXT, {"prompt": "\ud800"}, 400, "prompt", "invalid_value"),
    (TEXT, {**P, "temperature": 3}, 400, "temperature", "invalid_value"),
    (TEXT, {**P, "temperature": "hot"}, 400, "temperature", "invalid_value"),
    (TEXT, {**P, "n": 0}, 400, "n", "invalid_value"),
    (TEXT, {"prompt": ["a"] * 9, "n": 100}, 400, "n", "invalid_value"),
    (TEXT, {**P, "max_tokens": 4000}, 400, "max_tokens", "context_length_exceeded"),
    (TEXT, {"prompt": "a" * 3000}, 400, "prompt", "context_length_exceeded"),
    (TEXT, {**P, "logit_bias": {"999": 1}}, 400, "logit_bias", "invalid_value"),
    (TEXT, {**P, "best_of": 3, "stream": True}, 400, "best_of", "invalid_value"),
    (TEXT, {**P, "stream_options": {}}, 400, "stream_options", "invalid_value"),
    (TEXT, {**P, "suffix": "b"}, 400, "suffix", "invalid_value"),
    (TEXT, {**P, "model": "gpt"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "king", "content": ""}]}, 400, "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", None),
    (CHAT, {**M, "top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    (CHAT, {**M, "tool_choice": "auto"}, 400, "tool_choice", "invalid_value"),
    (CHAT, {**M, "tools": TOOLS, "tool_choice": "some"}, 400, "tool_choice", "invalid_value"),
    (CHAT, {**M, "response_format": {"type": "xml"}}, 400, "response_format", "invalid_value"),
    (TEXT, {**P, "structured_outputs": {}}, 400, "structured_outputs", None),
    (CHAT, {**M, "chat_template": "{{ 1 }}"}, 400, "chat_template", "invalid_value"),
    (CHAT, {**M, "chat_template_kwargs": {"allow_special": 1}}, 400, "chat_template_kwargs", None),
    ("/v1/embeddings", {"input": "a", "dimensions": 999}, 400, "dimensions", "invalid_value"),
    ("/v1/embeddings", {"input": "a" * 3000}, 400, "input", "context_length_exceeded"),
    ("/v1/score", {"input": ["a", "b"]}, 400, "input", "invalid_value"),
    ("/v1/score", {"input": [["a", [1]]]}, 400, "input[0]", "invalid_value"),
    ("/v1/score", {"input": [[[1], []]]}, 400, "input[0]", "invalid_value"),
    ("/v1/score", {"input": [["", "b"]]}, 400, "input[0]", "invalid_value"),
    ("/v1/score", {"input": [["a" * 2000, "b" * 49]]}, 400, "input", "context_length_exceeded"),
    ("/tokenize", {}, 400, "prompt", "invalid_value"),
    ("/detokenize", {"tokens": [999]}, 400, "tokens", "invalid_value"),
    ("/v1/nothing", {}, 404, None, "not_found"),
    ("/v1/models", {}, 405, None, "method_not_allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), WRONG)
def test_every_wrong_request_gets_openais_error_that_names_the_field(
    url, path, body, status, param, code
):
    got, headers, told = post(url, path, body)
    assert got == status, told
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["param"] == param
    assert code is None or told["error"]["code"] == code
    assert told["error"]["type"] == (
        "not_found_error" if status == 404 else "invalid_request_error"
    )
    assert headers["x-should-retry"] == "false"
    assert "Traceback" not in told["error"]["message"]


def test_the_clients_errors_are_typed(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="scripted", prompt="a", max_tokens=4000)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    assert "4001" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_without_a_template_the_server_says_so():
    with serving(ScriptedEngine(template=None)) as (url, _):
        assert post(url, CHAT, M)[2]["error"]["code"] == "no_chat_template"


def test_keys_guard_everything_but_health():
    with serving(ScriptedEngine(), api_keys=("right", "too"), max_body_bytes=1000) as (url, _):
        with connect(url, api_key="wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with connect(url, api_key="too") as right:
            assert right.models.list().data
            with pytest.raises(openai.APIStatusError) as caught:
                right.completions.create(model="scripted", prompt="x" * 2000)
            assert caught.value.status_code == 413
        for path in ("/metrics", "/openapi.json", "/v1/nothing", "/version"):
            status, headers, told = read(url + path)
            assert (status, told["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready"):
            assert read(url + path)[0] == 200


def test_a_body_without_a_length_is_measured_too():
    head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
    with serving(ScriptedEngine(), max_body_bytes=1000) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(head + (b"200\r\n" + b"x" * 512 + b"\r\n") * 3 + b"0\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_429_and_the_client_tries_again():
    engine = ScriptedEngine({"Long": "x" * 60}, pause=0.005, slots=1, most_waiting=1)
    with serving(engine) as (url, _), connect(url) as client:
        asked = {"model": "scripted", "prompt": "Long", "max_tokens": 50}
        first = client.completions.create(stream=True, **asked)
        second = threading.Thread(target=lambda: client.completions.create(**asked))
        second.start()
        wait_until(lambda: engine.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        with connect(url, max_retries=2) as patient:
            assert patient.completions.create(**asked).choices[0].text == "x" * 50
        first.close()
        second.join()
