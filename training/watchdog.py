"""A thread that reports a step that does not end, with the stack of every thread.

The loop beats once a step; everything that is known to take long has its own, longer limit. If
native code holds the interpreter's lock, so that not even this thread can run, `faulthandler`'s
timer, which needs no lock, writes the stacks.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections import deque
from statistics import median
from typing import Any

from training.incidents import Incidents

STEP = "step"


class Watchdog:
    """Reports each hang once, to `incidents.jsonl` and stderr, and says when it is over."""

    def __init__(
        self,
        incidents: Incidents,
        seconds: float = 120.0,
        long_seconds: float = 1800.0,
        poll_seconds: float = 1.0,
    ) -> None:
        """`seconds`, or 10 median steps, limit a step; `long_seconds` limits any other phase."""
        self.incidents, self.seconds, self.long_seconds = incidents, seconds, long_seconds
        self._poll = min(poll_seconds, seconds / 4)
        self._beats: deque[float] = deque(maxlen=64)
        self._now: tuple[int, str, float] = (0, "start", time.monotonic())
        self._reported = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._now = (self._now[0], self._now[1], time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int, phase: str = STEP) -> None:
        """Say that `step` updates are done and that `phase` begins: "step", "compile",
        "evaluation", "checkpoint" …
        """
        before, now = self._now, time.monotonic()
        if before[1] == phase == STEP and step > before[0]:
            self._beats.append((now - before[2]) / (step - before[0]))
        self._now = (step, phase, now)
        if self._reported:
            self._reported = False
            self.incidents.add("recovered", step=step, phase=before[1], seconds=now - before[2])

    def state(self) -> dict[str, Any]:
        """`step`, `phase`, the seconds `waited` since the last beat, and their `limit`."""
        step, phase, since = self._now
        waited = time.monotonic() - since
        return {"step": step, "phase": phase, "waited": waited, "limit": self.limit(phase)}

    def limit(self, phase: str) -> float:
        """Seconds after which a phase counts as hung."""
        if phase != STEP:
            return self.long_seconds
        return max(self.seconds, 10 * median(list(self._beats) or [0.0]))

    def _watch(self) -> None:
        while not self._ended.wait(self._poll):
            step, phase, since = self._now
            limit = self.limit(phase)
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(2 * limit, file=sys.__stderr__)
            waited = time.monotonic() - since
            if waited > limit and not self._reported:
                self._reported = True
                self._report(step, phase, waited, limit)

    def _report(self, step: int, phase: str, waited: float, limit: float) -> None:
        threads = stacks(leave_out=threading.get_ident())
        text = "\n".join(f"--- thread {name}\n{stack}" for name, stack in threads.items())
        print(
            f"watchdog: no progress for {waited:.0f} s (limit {limit:.0f} s) in phase {phase!r} "
            f"after step {step}; the stacks of all threads follow\n{text}",
            file=sys.stderr,
            flush=True,
        )
        self.incidents.add("hang", step=step, phase=phase, seconds=waited, stacks=threads)


def stacks(leave_out: int = 0) -> dict[str, str]:
    """The Python stack of every thread, by the thread's name, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != leave_out
    }
