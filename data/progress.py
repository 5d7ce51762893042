"""A progress line with speed and time left: a rich bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """Tells how far a long job is, in bytes of `total`; use as a context manager.

    `say` takes finished lines (`print` by default); a terminal gets a live bar instead of the lines between.
    """

    def __init__(
        self, title: str, total: int, say: Callable[[str], None] = print, every: float = 5.0
    ) -> None:
        self._title, self._total, self._say, self._every = title, max(total, 1), say, every
        self._bar = None

    def __enter__(self) -> Progress:
        self._began = self._last = time.monotonic()
        self._first: int | None = None
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

    def update(self, done: int, tokens: int, rows: int) -> None:
        """`done` bytes of the total are read; `tokens` and `rows` were made since the start."""
        self._first = done if self._first is None else self._first
        now = time.monotonic()
        seconds = max(now - self._began, 1e-6)
        speed = (done - self._first) / seconds
        rates = f"{rows / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s"
        note = f"{speed / 1e6:.1f} MB/s, {rates}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif now - self._last >= self._every:
            self._last = now
            left = (
                f"{(self._total - done) / speed:.0f} s left" if speed > 0 else "time left unknown"
            )
            self._say(
                f"{self._title}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {note}, {left}"
            )
