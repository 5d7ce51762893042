"""What stands before every route: who may come in, how large a body is, and clients that leave.

`Gate` is plain ASGI around the app, so that it sees all routes and all failures. It reads the whole
body first; from then on the only news from a client is that it left, upon which the work is
cancelled, whether the answer is a stream or not.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.server.errors import ApiError, as_api_error, internal_error
from serving.server.logs import LEFT, Note
from serving.server.service import Service

BODY_SECONDS, DISCARD_SECONDS = 60.0, 5.0
OPEN_PATHS = frozenset(("/", "/health", "/ready"))
"""Need no key: the page is the same for everybody, and its reader types the key into it."""
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
logger = logging.getLogger("sheaf.server")


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class Gate:
    """The outermost part of the app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        note = Note(request_id(headers), scope["method"], scope["path"])
        scope["note"] = note
        sender = _noting(send, note)
        try:
            await self._answer(scope, headers, receive, sender)
        except ClientLeftError:
            note.status = LEFT
        except Exception as error:
            await self._told(error, note, scope, receive, sender)
        finally:
            note.write(self._service)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        check_key(headers, scope["path"], self._service)
        body = await read_body(headers, receive, self._service.settings.max_body_bytes)
        leaving = asyncio.ensure_future(_wait_for_end(receive))
        work = asyncio.ensure_future(self._app(scope, _replaying(body, leaving), send))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not (work.done() or scope["note"].complete):
                raise ClientLeftError
            await work
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _told(
        self, error: Exception, note: Note, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if (told := as_api_error(error)) is None:
            logger.error("request %s failed", note.id, exc_info=error)
            told = internal_error()
        if note.status is not None:  # an answer has begun, so all that is left is to break it off
            raise error
        await told.response()(scope, receive, send)


def check_key(headers: Mapping[str, str], path: str, service: Service) -> None:
    """Raise 401 where no right key comes with a request that needs one."""
    settings = service.settings
    is_open = path in OPEN_PATHS or (path == "/metrics" and settings.open_metrics)
    if not settings.api_keys or is_open:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # All keys are compared, so that the time says nothing of which one was nearly right.
    right = [hmac.compare_digest(given.encode(), key.encode()) for key in settings.api_keys]
    if scheme.lower() != "bearer" or not any(right):
        message = "the API key is missing or wrong; it must come as Authorization: Bearer KEY"
        raise ApiError(401, message)


async def read_body(headers: Mapping[str, str], receive: Receive, most: int) -> bytes:
    """The whole body of a request. Raises 413 for one that is too large."""
    parts: list[bytes] = []
    size, declared = 0, headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > most
    try:
        async with asyncio.timeout(DISCARD_SECONDS if too_large else BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
                # The rest is read and thrown away: most clients look for an answer only after it.
                if too_large := too_large or size > most:
                    parts.clear()
                else:
                    parts.append(message.get("body", b""))
    except TimeoutError:
        if not too_large:
            message = f"the body did not come within {BODY_SECONDS:g} seconds"
            raise ApiError(408, message, code="request_timeout") from None
    if too_large:
        raise ApiError(413, f"the body is too large; it may have {most:,} bytes")
    return b"".join(parts)


def request_id(headers: Mapping[str, str]) -> str:
    """The client's name for its request, if it is a plain one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _noting(send: Send, note: Note) -> Send:
    """`send` that notes the status and the end, and names the request."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            note.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = note.id
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        note.complete |= ends
        await send(message)

    return noted


def _replaying(body: bytes, leaving: asyncio.Future[None]) -> Receive:
    """`receive` that gives the body, then the client's leaving."""
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await asyncio.wait({leaving})
        return {"type": "http.disconnect"}

    return receive


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
