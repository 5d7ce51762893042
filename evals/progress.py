"""How far an evaluation is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType


class Progress:
    """Requests answered, of those that are known of; a context manager.

    say: takes lines where there is no terminal; None is silent everywhere. every: seconds between
    two lines.
    """

    def __init__(self, say: Callable[[str], None] | None = print, every: float = 10.0) -> None:
        self._say, self._every = say, every
        self._total = self._done = self._fresh = 0
        self._title, self._bar = "", None
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if self._say is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, title: str, count: int, known: int = 0) -> None:
        """`count` more requests, of which `known` are answered already."""
        self._title = title
        self._total += count
        self.advance(known, fresh=False)

    def advance(self, count: int, fresh: bool = True) -> None:
        """`count` more are answered; fresh: they were computed, so the time left goes by them."""
        self._done += count
        self._fresh += count if fresh else 0
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._task, description=self._title, completed=self._done, total=self._total
            )
        elif self._say is not None and now - self._last >= self._every:
            self._last = now
            self._say(f"{self._title}: {self._done:,} of {self._total:,} requests{self._left(now)}")

    def _left(self, now: float) -> str:
        if not self._fresh:
            return ""
        seconds = (self._total - self._done) * (now - self._began) / self._fresh
        return f", {seconds:,.0f} s left"
