"""A run's record while it is made: metrics, evaluations, incidents, and the data's order.

Process 0 writes; on the others all methods but `incidents` do nothing. No step ever stands twice in
a file: `rewind` cuts off what came after the step that a run goes on from.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model.checkpoint import on_first_process
from model.checkpoint_folder import read_json, write_json
from training import json_lines
from training.errors import RunError
from training.incidents import Incidents
from training.plots import plot_loss
from training.run_folder import MAY_CHANGE, RunFolder, claim, lock

Ranges = tuple[tuple[int, int], ...]
TENSORBOARD_SECONDS = 1.0
"""Least time between two training steps in TensorBoard (0.7 ms each); `metrics.jsonl` has all."""
NEW_ORDER: Mapping[str, Any] = {"data": {}, "skips": [], "deferred": []}


class Record:
    """The record of one run, which this job holds until `close`."""

    def __init__(
        self,
        root: str | Path,
        config: Mapping[str, Any],
        may_change: tuple[str, ...] = MAY_CHANGE,
        tensorboard: bool = True,
    ) -> None:
        """Make or take up the run in a folder; `changed` says in which fields its config differs.

        Raises `RunError` if it is another run's folder, or in use.
        """
        self.folder = RunFolder(Path(root).absolute())
        self.first = jax.process_index() == 0
        self.changed: dict[str, list[Any]] = {}
        self._lock: Any = None
        self._last_step = 0
        self._drawn = -TENSORBOARD_SECONDS
        on_first_process(lambda: self._open(config, may_change), RunError)
        exists = self.folder.order.exists()
        self._order = read_json(self.folder.order) if exists else dict(NEW_ORDER)
        self.incidents = Incidents(self.folder.incidents)
        self._tensorboard = tensorboard and self.first
        self._writer: Any = None

    def rewind(self, step: int, branch: str = "") -> int:
        """Cut off the rows of steps after `step`, from which the run goes on; how many there were.

        With a `branch` they are kept in `branches/BRANCH/`.
        """
        removed = 0
        if self.first:
            for path in (self.folder.metrics, self.folder.evaluations):
                rows = json_lines.cut(path, lambda row: row["step"] <= step)
                removed += len(rows)
                if branch and rows:
                    (self.folder.branches / branch).mkdir(parents=True, exist_ok=True)
                    for row in rows:
                        json_lines.append(self.folder.branches / branch / path.name, row)
        self._last_step = step
        self._close_tensorboard()
        return removed

    def metrics(self, step: int, values: Mapping[str, Any], batch: str = "") -> None:
        """Add the row of a training step; `batch` is the hash of what it read.

        Raises `ValueError` if the step is not after the last one, `OSError` if the disk is full.
        """
        if not self.first:
            return
        if step <= self._last_step:
            raise ValueError(
                f"{self.folder.metrics}: step {step} after step {self._last_step}; rewind first"
            )
        row = {"step": step, "time": round(time.time(), 3), **values}
        json_lines.append(self.folder.metrics, row | ({"batch": batch} if batch else {}))
        self._last_step = step
        if time.monotonic() - self._drawn >= TENSORBOARD_SECONDS:
            self._drawn = time.monotonic()
            self._scalars("train", step, values)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the row of an evaluation of the parameters after `step`."""
        if not self.first:
            return
        row = {"step": step, "time": round(time.time(), 3), **values}
        json_lines.append(self.folder.evaluations, row, durable=True)
        self._scalars("validation", step, values)

    @property
    def data(self) -> Mapping[str, Any]:
        """What the batches are made of, by `order.json`; empty for a new run."""
        return self._order["data"]

    @property
    def skips(self) -> Ranges:
        """Batches that are never used, by `order.json`."""
        return tuple((start, stop) for start, stop in self._order["skips"])

    @property
    def deferred(self) -> Ranges:
        """Batches that are used at the end of the run, by `order.json`."""
        return tuple((start, stop) for start, stop in self._order["deferred"])

    def write_data(self, manifest: Mapping[str, Any]) -> None:
        """Note for good what the batches are made of."""
        self._write_order(self._order | {"data": json_lines.plain(manifest)})

    def drop(self, batches: tuple[int, int], defer: bool = False) -> None:
        """Note for good that batches `[start, stop)` are skipped, or deferred to the run's end."""
        name = "deferred" if defer else "skips"
        self._write_order(self._order | {name: [*self._order[name], list(batches)]})

    @property
    def rollbacks(self) -> int:
        """How many rollbacks the run has made since it began, whether or not it was resumed."""
        return len(self.skips) + len(self.deferred)

    def plot(self) -> Path | None:
        """Draw `loss.png`; None if there is nothing to draw."""
        if not self.first:
            return None
        try:
            files = (self.folder.metrics, self.folder.evaluations, self.folder.plot)
            return plot_loss(*files, title=self.folder.root.name)
        except ValueError:
            return None

    def close(self) -> None:
        """Write out what is buffered and let go of the run."""
        self._close_tensorboard()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _open(self, config: Mapping[str, Any], may_change: tuple[str, ...]) -> str:
        self._lock = lock(self.folder)
        try:
            self.changed = claim(self.folder, config, may_change)
        except BaseException:
            self._lock.close()
            raise
        rows = json_lines.read(self.folder.metrics)
        self._last_step = rows[-1]["step"] if rows else 0
        return ""

    def _write_order(self, order: dict[str, Any]) -> None:
        self._order = order
        if self.first:
            write_json(self.folder.order, order)

    def _close_tensorboard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._tensorboard:
            return
        self._writer = self._writer or _tensorboard_writer(self.folder.tensorboard, step)
        for name, value in values.items():
            if value is not None and not isinstance(value, str) and np.ndim(value) == 0:
                self._writer.add_scalar(f"{group}/{name}", float(value), step)


def _tensorboard_writer(folder: Path, step: int) -> Any:
    """A writer whose readers drop what they know of `step` and later: those are written again."""
    from tensorboardX import SummaryWriter  # takes long to import

    return SummaryWriter(str(folder), purge_step=step)


def batch_hash(batch: Mapping[str, Any], first_row: int = 0) -> int:
    """A 64-bit sum over the rows of a batch, arrays `[rows, ...]` that begin at row `first_row`.

    Parts of a batch on several hosts add up, modulo 2^64, to the hash of the whole: `combine`.
    """
    names = sorted(batch)
    arrays = [np.ascontiguousarray(batch[name]) for name in names]
    kinds = "".join(f"{n}:{a.dtype.str}{a.shape[1:]};" for n, a in zip(names, arrays, strict=True))
    total = 0
    for row in range(len(arrays[0]) if arrays else 0):
        digest = hashlib.blake2b(f"{kinds}{first_row + row};".encode(), digest_size=8)
        for array in arrays:
            digest.update(array[row].tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64


def combine(hashes: list[int]) -> str:
    """The hash of a whole batch from those of its parts, as 16 hexadecimal digits."""
    return f"{sum(hashes) % 2**64:016x}"
