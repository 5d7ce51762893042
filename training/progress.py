"""What a person sees while a run goes on: one live line in a terminal, plain lines in a log file.

The time left leaves compilation out and counts the evaluations to come.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03` or `--`."""
    if seconds is None:
        return "--"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def count(number: float) -> str:
    """`950`, `12.3k`, `4.56M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


class _LeftColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{duration(task.fields.get('seconds_left'))} left", style="cyan")


class RunProgress:
    """The progress of one run; used as a context manager, silent on every process but the first."""

    def __init__(
        self, total: int, done: int = 0, visible: bool = True, console: Console | None = None
    ):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=not visible)
        self.total, self.terminal = total, self.console.is_terminal and visible
        self._bar = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            _LeftColumn(),
            console=self.console,
            disable=not self.terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, text="compiling …")
        self._last_line = -PLAIN_SECONDS

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, text: str, seconds_left: float | None) -> None:
        """Show the state after `step`."""
        self._bar.update(self._task, completed=step, text=text, seconds_left=seconds_left)
        now = time.monotonic()
        if not self.terminal and (now - self._last_line >= PLAIN_SECONDS or step == self.total):
            self._last_line = now
            self.console.print(
                f"step {step}/{self.total}  {text}  {duration(seconds_left)} left", markup=False
            )

    def say(self, message: str) -> None:
        """A line that stays."""
        self.console.print(message, markup=False)
