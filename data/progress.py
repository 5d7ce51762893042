"""Speed and time left of a long job: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """How far a job is, in bytes of `total`; a context manager.

    `say` takes the lines; a terminal gets one live bar in their place.
    """

    def __init__(
        self, title: str, total: int, say: Callable[[str], None] = print, every: float = 5.0
    ) -> None:
        self._title, self._total, self._say, self._every = title, max(total, 1), say, every
        self._tokens = self._rows = 0
        self._first: int | None = None
        self._bar = None

    def __enter__(self) -> Progress:
        self._began = self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} % {task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, tokens: int, rows: int) -> None:
        """`done` bytes of the total are read; `tokens` and `rows` more were made."""
        self._first = done if self._first is None else self._first
        self._tokens += tokens
        self._rows += rows
        now = time.monotonic()
        seconds = max(now - self._began, 1e-6)
        speed = (done - self._first) / seconds
        note = f"{speed / 1e6:.1f} MB/s, {self._rows / seconds:,.0f} rows/s, "
        note += f"{self._tokens / seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif now - self._last >= self._every:
            self._last = now
            left = f"{(self._total - done) / speed:.0f} s left" if speed else "time left unknown"
            amount = f"{done / 1e6:.1f} of {self._total / 1e6:.1f} MB"
            self._say(f"{self._title}: {amount}, {note}, {left}")
