"""A process that renders chat templates, started on first use, with a deadline for each answer."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("chat_worker.py")
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
LENGTH_BYTES = 8
STARTUP_SECONDS = 60.0
LONGEST_ANSWER = 2**28


class WorkerError(RuntimeError):
    """The process gave no answer: it took too long, died, or said too much."""


class ChatProcess:
    """Answers of `data/chat_worker.py`, one at a time; it is started anew where it was lost.

    Threads may share it; after a fork or a pickle there is another process.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen | None = None

    def __reduce__(self) -> tuple:
        return ChatProcess, (self._seconds,)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises `WorkerError` after `seconds`, and for a process that died or was flooded.
        """
        with self._lock:
            process = self._running()
            try:
                content = json.dumps(request).encode()
                _send(process, len(content).to_bytes(LENGTH_BYTES, "big") + content)
                return _receive(process, self._seconds)
            except BaseException:
                self._process = None
                _stop(process, self._owner)
                raise

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process, self._owner = _start(), os.getpid()
            weakref.finalize(self, _stop, self._process, self._owner)
        return self._process


def _start() -> subprocess.Popen:
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("chat templates are rendered by jinja2: pip install 'sheaf[hub]'")
    process = subprocess.Popen(
        [sys.executable, "-P", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
    )
    try:
        _receive(process, STARTUP_SECONDS)
    except BaseException:
        _stop(process, os.getpid())
        raise
    return process


def _send(process: subprocess.Popen, content: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(content)
        process.stdin.flush()
    except OSError as error:
        raise WorkerError(f"the process that renders is gone ({error})") from error


def _receive(process: subprocess.Popen, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    length = int.from_bytes(_read(process, LENGTH_BYTES, deadline, seconds), "big")
    if length > LONGEST_ANSWER:
        raise WorkerError(f"the text has {length:,} bytes, more than {LONGEST_ANSWER:,}")
    return json.loads(_read(process, length, deadline, seconds))


def _read(process: subprocess.Popen, size: int, deadline: float, seconds: float) -> bytes:
    assert process.stdout is not None
    number, content = process.stdout.fileno(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_READ)
        while len(content) < size:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise WorkerError(f"no answer in {seconds:g} seconds")
            part = os.read(number, min(size - len(content), 2**20))
            if not part:
                raise WorkerError("the process that renders died, of too much memory or recursion")
            content += part
    return bytes(content)


def _stop(process: subprocess.Popen, owner: int) -> None:
    """Kill the process and close its pipes, unless a fork only inherited them."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
