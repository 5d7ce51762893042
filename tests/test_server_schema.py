"""The server against its own OpenAPI description: whatever fits it is answered as it says."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from scripted_engine import TEMPLATE, post, serving
from tiny_engine import SETTINGS, TOKENIZER, checkpoint

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving import Engine  # noqa: E402

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def described():
    """The real engine and server, and what the server says of itself."""
    files = {**TOKENIZER.files(), "chat_template.jinja": TEMPLATE.encode()}
    engine = Engine(checkpoint(files), dataclasses.replace(SETTINGS, max_model_len=48))
    with serving(engine) as (url, _):
        yield url, schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_requests_that_fit_the_description_get_answers_that_fit_it(described):
    _, schema = described
    found = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        found.add(operation.label)

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def answered_as_described(case):
            case.call_and_validate(checks=CHECKS, timeout=300)

        answered_as_described()
    routes = ["completions", "chat/completions", "embeddings", "score", "models"]
    assert {f"POST /v1/{route}" for route in routes[:-1]} < found
    assert {"GET /v1/models", "GET /metrics", "POST /reset_prefix_cache"} < found


VALID = [
    ("/v1/completions", {"prompt": ["ab", "c"], "logprobs": 2, "echo": True, "max_tokens": 2}),
    ("/v1/completions", {"prompt": [1, 2], "stream": True, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 1,
        },
    ),
    ("/v1/embeddings", {"input": ["a", "bc"]}),
    ("/v1/embeddings", {"input": [1, 2], "encoding_format": "base64", "dimensions": 4}),
    ("/v1/score", {"input": [["ab", "c"], ["d", " e"]]}),
    ("/tokenize", {"prompt": "abc"}),
    ("/detokenize", {"tokens": [97]}),
]


@pytest.mark.parametrize(("path", "body"), VALID)
def test_whole_answers_fit_the_description(described, path, body):
    """Drawn requests are mostly refused, since few random ids and lengths fit a tiny model."""
    _, schema = described
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(checks=CHECKS, timeout=300)
    assert response.status_code == 200


def test_nothing_of_the_description_is_fastapis_own(described):
    url, schema = described
    assert "HTTPValidationError" not in str(schema.raw_schema)
    assert post(url, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
