"""Server-sent events: a stream of JSON objects that ends with `[DONE]`, errors included."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.server.errors import as_api_error, dumps, internal_error

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
logger = logging.getLogger("sheaf.server")


def event(content: Any) -> bytes:
    """One event."""
    return b"data: " + dumps(content) + b"\n\n"


async def open_stream(events: AsyncGenerator[bytes]) -> EventStream:
    """Wait for the first event, so that what fails before it is an ordinary answer with a status.

    `events` yields at least one.
    """
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_to_the_end(first, events))


async def _to_the_end(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events, an error that comes in between as one of them, and the mark of the end."""
    try:
        yield first
        async for each in events:
            yield each
    except Exception as error:
        if (told := as_api_error(error)) is None:
            logger.exception("a stream failed")
            told = internal_error()
        yield event(told.body)
    finally:
        await events.aclose()
    yield DONE


class EventStream(Response):
    """Sends events as they come; however it ends, the generator behind them is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **start})
            async for each in self._events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()
