"""`incidents.jsonl`: what went wrong in a run and what was done about it; only ever added to.

Kinds: spike, nonfinite, rollback, hang, recovered, restart, interrupted, straggler, checkpoint.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jax

from training import json_lines


class Incidents:
    """The incident log of a run; safe to add to from any thread and process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, **facts: Any) -> dict[str, Any]:
        """Add a row with the time and this process's number; on the disk when this returns."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"time": now, "kind": kind, "process": jax.process_index(), **facts}
        json_lines.append(self.path, row, durable=True)
        return row

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one kind, oldest first."""
        return [row for row in json_lines.read(self.path) if kind in (None, row["kind"])]
