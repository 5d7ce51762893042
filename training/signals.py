"""SIGTERM and Ctrl-C as a request: the loop ends after its step, saves, and says how to go on.

A thread takes the signals, because Python runs its handlers in the main thread only and not before
the native code that is running there (a step, a save) has come back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HANDLED = (signal.SIGTERM, signal.SIGINT)


class GracefulStop:
    """While active, the first signal sets `reason`; a second Ctrl-C ends the process at once.

    Outside the main thread, where Python lets nobody change signals, it does nothing.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._before: dict[int, Any] = {}
        self._wakeup = -1
        self._pipe = (-1, -1)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _nothing) for number in HANDLED}
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._thread is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])
        self._thread.join()
        os.close(self._pipe[0])
        self._thread = None

    def __bool__(self) -> bool:
        """Whether this process has been asked to stop."""
        return bool(self.reason)

    def anywhere(self) -> bool:
        """Whether any process of the run has been asked; all must call this at the same step."""
        if jax.process_count() == 1:
            return bool(self)
        asked = np.asarray(multihost_utils.process_allgather(np.array([bool(self)]))).ravel()
        if asked.any() and not self.reason:
            self.reason = f"process {int(asked.argmax())} was asked to stop"
        return bool(asked.any())

    def _listen(self) -> None:
        while numbers := os.read(self._pipe[0], 64):
            for number in numbers:
                if number in HANDLED:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        if self.reason and number == signal.SIGINT:
            _write(f"\n{number.name} again: ending at once, without saving\n")
            os._exit(128 + number)
        if not self.reason:
            self.reason = number.name
            again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
            _write(f"\n{number.name}: saving after this step, then ending{again}\n")


def _nothing(number: int, frame: FrameType | None) -> None:
    """Stands in for the default handler, which would end the process."""


def _write(text: str) -> None:
    """Straight to stderr: another thread may hold the lock of a print for long."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
