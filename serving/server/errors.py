"""Errors in OpenAI's shape, whatever raised them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from data.chat import ChatTemplateError
from serving.checks import ParameterError
from serving.scheduler import QueueFullError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "server_error",
    503: "service_unavailable",
}
TEXTS = "a text, a list of texts, a list of ids, or a list of lists of ids"
PROMPTS = {"prompt": TEXTS, "input": f"{TEXTS}; for a score, pairs of texts or of lists of ids"}


class ApiError(Exception):
    """An answer that is an error.

    status: of HTTP. param: the field that is wrong. code: what a program may tell it by; None is
    that of the status. retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = TYPES.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """What a client goes by when it decides to try again."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(math.ceil(self.retry_after), 1))
        if self.status < 500 and self.status not in (408, 409, 429):
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        """The HTTP answer."""
        return JsonResponse(self.body, self.status, self.headers)


class JsonResponse(Response):
    """JSON in ASCII, so that no text of a client's, lone surrogates even, fails to be written."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(dumps(content), status, headers)


def dumps(content: Any) -> bytes:
    """One line of JSON; a number that JSON does not have is an error."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def as_api_error(error: BaseException) -> ApiError | None:
    """The answer to what the parts below raise; None for a failure of the server itself."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ParameterError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, ChatTemplateError):
        return ApiError(400, str(error), param="messages")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), retry_after=1.0)
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    return None


def internal_error() -> ApiError:
    """What a client is told of a failure; the log has the rest."""
    return ApiError(500, "the server failed; its log says why, under this answer's X-Request-Id")


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if (field := next((part for part in first["loc"] if part in PROMPTS), None)) is not None:
        said = "is missing" if first["type"] == "missing" else "is none of what it may be"
        return ApiError(400, f"{field} {said}; it must be {PROMPTS[field]}", param=str(field))
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not where:
        return ApiError(400, "the body must be a JSON object with Content-Type: application/json")
    return ApiError(400, f"{'.'.join(where)}: {first['msg']}", param=where[0])
