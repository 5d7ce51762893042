"""An app on an address until a signal ends it: new requests are refused, the others end first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from serving.server.errors import ApiError
from serving.server.service import Service

DONE, FAILED, CUT_SHORT = 0, 1, 3
LOOK_EVERY_S, CLOSE_SECONDS = 0.25, 5
SIGNALS = (signal.SIGTERM, signal.SIGINT)
logger = logging.getLogger("sheaf.server")


def run(app: FastAPI, on_address: Callable[[str], None] = lambda url: None) -> int:
    """Serve until SIGTERM or SIGINT; call it in the main thread.

    The first signal drains (`Service.drain`), a second ends at once. on_address: gets the URL when
    the socket listens. The status is 0 if every request ended by itself, 3 if some were cut short,
    1 if the engine failed. Raises `OSError` for an address that is not to be had.
    """
    service: Service = app.state.service
    settings = service.settings
    with listen(settings.host, settings.port) as listening:
        port = listening.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        on_address(f"http://{host}:{port}")
        return asyncio.run(_serve(app, service, listening))


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, port 0 for a free one. Raises `OSError` that names it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error


class _Server(uvicorn.Server):
    """uvicorn without its own signals: it would close before requests have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(app: FastAPI, service: Service, listening: socket.socket) -> int:
    settings = service.settings
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            timeout_keep_alive=max(round(settings.keep_alive_s), 1),
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )
    ending = asyncio.create_task(_end(server, service))
    try:
        await server.serve(sockets=[listening])
        if not server.started:
            return FAILED
        return await ending
    finally:
        ending.cancel()


async def _end(server: uvicorn.Server, service: Service) -> int:
    """Wait for what ends the server, and let it exit; the status."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        if not await _signal_or_failure(signals, service):
            server.should_exit = True
            return FAILED
        logger.info("draining", extra={"fields": {"requests": len(service.jobs)}})
        draining = asyncio.create_task(service.drain())
        again = asyncio.create_task(signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit, server.force_exit = True, not draining.done()
        if service.engine.failure is not None:
            return FAILED
        return DONE if draining.done() and draining.result() else CUT_SHORT
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def _signal_or_failure(signals: asyncio.Queue[int], service: Service) -> bool:
    """Wait for a signal (true) or for the engine to fail (false)."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await signals.get()
            return True
        if not service.engine.healthy and service.is_up:
            logger.error("the engine failed", exc_info=service.engine.failure)
            service.end_all(ApiError(500, "the engine failed; the server's log says why"))
            return False
