"""The folder of a run: what lies where, whose run it is, and that one job at a time writes it.

RUN/config.json         every field of the config
RUN/order.json          what the batches are made of; batches skipped and deferred
RUN/metrics.jsonl       a row for each logged step, with the hash of its batch
RUN/evaluations.jsonl   a row for each evaluation
RUN/incidents.jsonl     spikes, rollbacks, hangs, restarts, stragglers
RUN/tensorboard/        the metrics again
RUN/checkpoints/STEP/   see `model.checkpoint_folder`
RUN/branches/NAME/      what a rollback has undone
RUN/timeline/           what each process did when (`training.timeline`)
RUN/supervisor/         of a supervised run: its state, heartbeats and each worker's output
RUN/loss.png            the curve
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from model.checkpoint_folder import read_json, write_json
from training.errors import RunError
from training.json_lines import plain

MAY_CHANGE = (
    "name",
    "train.steps",
    "train.log_every",
    "train.timeline_every",
    "train.profile_start",
    "train.profile_steps",
    "train.remat",
    "train.scan_unroll",
    "train.accumulation",
    "data.path",
    "data.phases",
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "evaluation",
    "sample",
    "mesh",
    "sharding",
    "checkpoint",
    "faults",
)
"""Config fields, or their parents, that may differ when a run is resumed."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """Every field of the config."""
        return self.root / "config.json"

    @property
    def order(self) -> Path:
        """What the batches are made of."""
        return self.root / "order.json"

    @property
    def metrics(self) -> Path:
        """A row for each logged step."""
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """A row for each evaluation."""
        return self.root / "evaluations.jsonl"

    @property
    def incidents(self) -> Path:
        """What went wrong and what was done."""
        return self.root / "incidents.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """A folder for each saved step."""
        return self.root / "checkpoints"

    @property
    def branches(self) -> Path:
        """What rollbacks have undone."""
        return self.root / "branches"

    @property
    def timeline(self) -> Path:
        """A file of spans for each process."""
        return self.root / "timeline"

    @property
    def supervisor(self) -> Path:
        """What a supervisor keeps."""
        return self.root / "supervisor"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.root / "loss.png"


def claim(
    folder: RunFolder, config: Mapping[str, Any], may_change: tuple[str, ...] = MAY_CHANGE
) -> dict[str, list[Any]]:
    """Make the folder, or take it up again; `{field: [before, now]}` of changes in the config.

    Raises `RunError` if another run, or anything else, stands there; nothing is then touched.
    """
    now = plain(config)
    if folder.config.exists():
        changed = differences(read_json(folder.config), now)
        refused = [name for name in changed if not _within(name, may_change)]
        if refused:
            raise RunError(_another_run(folder, changed, refused))
    elif folder.root.is_dir() and any(_foreign(folder)):
        raise RunError(
            f"{folder.root} holds {', '.join(_foreign(folder)[:3])} but no {folder.config.name}, "
            "so it is no run; choose an empty or new folder with --workdir"
        )
    else:
        changed = {}
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, now)
    return changed


def differences(before: Any, now: Any, where: str = "") -> dict[str, list[Any]]:
    """`{"a.b": [before, now]}` of two nested dicts; a field that one lacks is None there."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return {} if before == now else {where: [before, now]}
    changed: dict[str, list[Any]] = {}
    for name in sorted(before.keys() | now.keys()):
        path = f"{where}.{name}" if where else name
        changed |= differences(before.get(name), now.get(name), path)
    return changed


def lock(folder: RunFolder) -> IO[str]:
    """Hold the run until the file given back is closed or this process ends, however it ends.

    Raises `RunError` if another process holds it.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    file = open(folder.root / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RunError(
            f"{folder.root} is in use by another process ({holder}); wait for it, end it, or "
            "choose another --workdir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def _within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _foreign(folder: RunFolder) -> list[str]:
    """What lies in a folder without a config and does not come from a run that begins."""
    own = ("lock", "data", folder.supervisor.name, folder.incidents.name)
    return sorted(entry.name for entry in folder.root.iterdir() if entry.name not in own)


def _another_run(folder: RunFolder, changed: dict[str, list[Any]], refused: list[str]) -> str:
    shown = "; ".join(
        f"{name} was {changed[name][0]!r}, is {changed[name][1]!r}" for name in refused[:5]
    )
    more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
    return (
        f"{folder.root} holds another run: {shown}{more}. Choose another --workdir, or put the "
        "fields back to resume it"
    )
