"""What this process's main thread is doing, and when: the raw material of a run's timeline.

The loop says what begins (`enter`); a span ends where the next begins, so spans cover all time and
cost one clock reading each. Every process writes `RUN/timeline/PROCESS.jsonl`:

    {"process": 1, "host": "node-7", "pid": 4711, "time": 1700000000.0}
    {"step": 20, "steps": 10, "seconds": 5.1, "spans": {"data": 0.02, …}, "start": …, "last": […]}

The first stands there once a process. A row adds up the spans of `steps` steps; `last` holds those
of the last step one by one, as `[name, seconds after start, seconds]`. A compiled step is one
program, so the host sees `dispatch` and `wait` of it and no more; what happens inside stands in the
profiler's trace. The time in none of `WAITING` is what ranks are compared by: see
`training.stragglers`.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from training import json_lines

WAITING = ("dispatch", "wait", "gather")
"""Spans in which a process waits for devices or for other processes."""
APART = ("start", "compile", "evaluation", "checkpoint")
"""Spans that are no part of a step."""
WRITE_SECONDS = 2.0
"""Least time between two writes."""


def host_name() -> str:
    """This process's host: `SHEAF_HOST`, by which a supervisor calls it, or the system's name."""
    return os.environ.get("SHEAF_HOST") or os.uname().nodename


class Timeline:
    """The spans of one process's main thread."""

    def __init__(self, folder: Path, every: int = 1, process: int | None = None) -> None:
        """`every` steps make a row of this process's file in `folder`; 0 writes nothing."""
        process = jax.process_index() if process is None else process
        self.current, self.every = "start", every
        self.waited = 0.0  # seconds in which this process waited for devices or others
        self.path = folder / f"{process}.jsonl" if every else None
        self._since = time.perf_counter()
        self._to_unix = time.time() - self._since
        self._rows: list[dict[str, Any]] = []
        self._written = self._since
        self._steps = 0
        self._totals: dict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, float, float]] = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"process": process, "host": host_name(), "pid": os.getpid()}
            self._rows.append(facts | {"time": round(time.time(), 3)})

    def enter(self, name: str) -> None:
        """What the main thread did has ended, and `name` begins."""
        now = time.perf_counter()
        self._totals[self.current] += now - self._since
        if self.current in WAITING:
            self.waited += now - self._since
        self._spans.append((self.current, self._since, now))
        self.current, self._since = name, now

    def step(self, step: int) -> None:
        """The work for a step, the `step`-th of the run, has ended; what follows is the next."""
        self.enter("data")
        self._steps += 1
        if self.path is not None and self._steps >= self.every:
            self._rows.append(self._row(step))
        if self._steps >= self.every:
            self._totals.clear()
            self._steps = 0
        self._spans.clear()
        if self._since - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Append what has come together to the file."""
        self._written = time.perf_counter()
        rows, self._rows = self._rows, []
        if self.path is not None:
            json_lines.extend(self.path, rows)

    def _row(self, step: int) -> dict[str, Any]:
        start = self._spans[0][1]
        return {
            "step": step,
            "steps": self._steps,
            "seconds": round(sum(self._totals.values()), 6),
            "spans": {name: round(seconds, 6) for name, seconds in self._totals.items()},
            "start": round(start + self._to_unix, 6),
            "last": [
                [name, round(begin - start, 6), round(end - begin, 6)]
                for name, begin, end in self._spans
            ],
        }
