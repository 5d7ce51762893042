"""Run again what a run recorded, and say whether it came out the same to the bit.

`python train.py --replay=RUN --to-step=N` begins from the seed, reads the batches that the run
read (those it skipped or deferred after a spike too), and applies each config from the step at
which the run was resumed with it. It then compares every step's loss and batch, and the parameters
of step N where the run still has that checkpoint.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model.checkpoint import load
from model.checkpoint_folder import read_json, step_name, write_json
from model.checkpoint_folder import steps as checkpoint_steps
from model.provenance import code_revision
from training import json_lines
from training.config import RunConfig, run_config
from training.errors import RunError
from training.language_model import train_language_model
from training.run_folder import RunFolder

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a replay compares with the run: steps compared, and what differed.

    steps: rows of metrics that both have. different: steps whose loss or batch differs.
    parameters: whether the parameters are equal to the bit; None if the run kept no checkpoint.
    revisions: of the code, when the run was made and now; a revision with changes ends in "+".
    """

    steps: int
    different: tuple[int, ...]
    parameters: bool | None
    revisions: tuple[str, str] = ("", "")

    @property
    def equal(self) -> bool:
        """Nothing differed."""
        return not self.different and self.parameters is not False

    def __str__(self) -> str:
        losses = (
            f"all {self.steps} losses and batches are equal"
            if not self.different
            else f"{len(self.different)} of {self.steps} steps differ, first {self.different[0]}"
        )
        words = {True: "equal to the bit", False: "DIFFERENT", None: "not kept by the run"}
        text = f"{losses}; parameters: {words[self.parameters]}"
        made, now = self.revisions
        if not self.equal and (made != now or now.endswith("+")):
            text += f"; the code may explain it: the run was made by {made}, this is {now}"
        return text


def replay(run: str | Path, to_step: int, workdir: str | Path | None = None) -> int:
    """Replay a run up to a step and print the comparison; 0 if all is equal, 1 if not.

    Raises `RunError` if there is no such run or it has not come that far.
    """
    comparison = compare_replay(run, to_step, workdir)
    print(f"replayed {to_step} steps of {run}: {comparison}")
    return 0 if comparison.equal else 1


def compare_replay(run: str | Path, to_step: int, workdir: str | Path | None = None) -> Comparison:
    """Replay in `workdir` (default `RUN/replays/STEP`, begun afresh) and compare."""
    folder = RunFolder(Path(run).absolute())
    rows = _rows(folder, to_step)
    target = RunFolder(Path(workdir or folder.root / "replays" / step_name(to_step)).absolute())
    if workdir is None:
        shutil.rmtree(target.root, ignore_errors=True)
    history = config_history(folder)
    order = read_json(folder.order)
    ends = [start for start, _ in history[1:]] + [to_step]
    result = None
    for (_, config), end in zip(history, ends, strict=True):
        if not target.order.exists():
            _begin(target, config, order)
        result = train_language_model(_quietly(config), target.root, stop_at=min(end, to_step))
        if end >= to_step:
            break
    assert result is not None
    again = {row["step"]: row for row in json_lines.read(target.metrics)}
    different = tuple(step for step, row in rows.items() if _differs(row, again.get(step, {})))
    same = _same_parameters(folder, to_step, result.state.params)
    return Comparison(len(rows), different, same, (_made_by(folder), _revision(code_revision())))


def config_history(folder: RunFolder) -> list[tuple[int, RunConfig]]:
    """`(first step done before it applied, config)` along the branch of a run that survived."""
    configs = [read_json(folder.config)]
    incidents = json_lines.read(folder.incidents)
    for row in reversed([row for row in incidents if row["kind"] == "restart"]):
        configs.append(_undo(configs[-1], row.get("changed", {})))
    configs.reverse()
    history, number = [(0, configs[0])], 0
    for row in incidents:
        if row["kind"] == "restart":
            number += 1
            start = row["step"]
        elif row["kind"] == "rollback":
            start = row["to_step"]
        else:
            continue
        history = [entry for entry in history if entry[0] < start]
        if not history or history[-1][1] != configs[number]:
            history.append((start, configs[number]))
    return [(start, run_config(config)) for start, config in history]


def _undo(config: dict[str, Any], changed: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The config before a resume that changed `{"a.b": [before, now]}`."""
    before = json_copy(config)
    for dotted, (old, _) in changed.items():
        *parents, name = dotted.split(".")
        node = before
        for parent in parents:
            node = node[parent]
        node[name] = old
    return before


def json_copy(value: Any) -> Any:
    """A copy of nested dicts and lists."""
    if isinstance(value, Mapping):
        return {key: json_copy(item) for key, item in value.items()}
    return list(map(json_copy, value)) if isinstance(value, (list, tuple)) else value


def _rows(folder: RunFolder, to_step: int) -> dict[int, Row]:
    if not folder.config.exists():
        raise RunError(f"--replay={folder.root}: no run stands there (it has no config.json)")
    rows = {row["step"]: row for row in json_lines.read(folder.metrics)}
    last = max(rows, default=0)
    if not 1 <= to_step <= last:
        raise RunError(f"--to-step={to_step}: the run has recorded steps 1 to {last}")
    return {step: row for step, row in rows.items() if step <= to_step}


def _begin(target: RunFolder, config: RunConfig, order: Any) -> None:
    """A folder in which the batches that the run dropped are dropped from the beginning."""
    target.root.mkdir(parents=True, exist_ok=True)
    write_json(target.config, json_lines.plain(dataclasses.asdict(_quietly(config))))
    write_json(target.order, order)


def _quietly(config: RunConfig) -> RunConfig:
    """The same numbers with no evaluation, no checkpoint on the way and no rollback."""
    return dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, every=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=0),
        faults=dataclasses.replace(config.faults, spike_action="alert"),
    )


def _differs(row: Row, again: Row) -> bool:
    return any(row.get(name) != again.get(name) for name in ("loss", "batch", "grad_norm"))


def _made_by(folder: RunFolder) -> str:
    """The code revision that wrote the newest checkpoint of a run."""
    steps = checkpoint_steps(folder.checkpoints)
    if not steps:
        return "an unknown revision"
    path = folder.checkpoints / step_name(steps[-1]) / "provenance.json"
    return _revision(read_json(path).get("code", {}))


def _revision(code: Mapping[str, Any]) -> str:
    return (code.get("revision") or "an unknown revision")[:19] + ("+" if code.get("dirty") else "")


def _same_parameters(folder: RunFolder, step: int, params: Any) -> bool | None:
    saved = folder.checkpoints / step_name(step)
    if not saved.is_dir():
        return None
    mine, theirs = jax.tree.leaves(params), jax.tree.leaves(load(saved).params)
    return all(
        np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
        for a, b in zip(mine, theirs, strict=True)
    )
