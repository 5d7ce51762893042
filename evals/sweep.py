"""The checkpoints of a run, each measured by the same tasks, after training or beside it.

    found = sweep("runs/quickstart", ["needle"], out="out")

OUT/sweep.json           the checkpoints that were measured: step, tokens seen, what was asked
OUT/STEP/results.json    one checkpoint, as `evals.results` has a model
OUT/requests.sqlite      every answer

All checkpoints have the same shapes, so programs are compiled for the first one only.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import results
from evals.backends import InProcess
from evals.evaluation import Model, evaluate
from evals.registry import build
from evals.runner import Options, data_hash
from evals.store import canonical, code_fingerprint, sha256
from evals.task import Role, Task
from model.checkpoint_folder import (
    CHECKPOINTS,
    COMMIT,
    PARAMS,
    CheckpointError,
    problem,
    read_json,
    step_name,
    steps,
    write_json,
)
from sharding import Layout
from training import json_lines
from training.json_lines import plain
from training.run_folder import RunFolder

FILE, FORMAT = "sweep.json", 1
EVENTS = ("spike", "nonfinite", "rollback")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """A measured checkpoint.

    tokens: seen in training until then; None where the run's metrics do not say. commit: SHA-256 of
    its `commit.json`. asked: a hash for each task, of all that its result depends on beside that.
    """

    step: int
    tokens: int | None
    commit: str
    asked: Mapping[str, str]


@dataclass(frozen=True)
class Sweep:
    """What stands in `sweep.json`. incidents: `(step, kind)` of the run."""

    run: str
    points: tuple[Point, ...] = ()
    incidents: tuple[tuple[int, str], ...] = ()


def sweep(
    run: str | Path,
    tasks: Sequence[str | Task],
    *,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    options: Options | None = None,
    roles: Mapping[Role, Model] | None = None,
    layout: Layout | None = None,
    follow: bool = False,
    poll: float = 10.0,
    say: Say | None = print,
    **model_options: Any,
) -> Sweep:
    """Measure every checkpoint of a run that is not measured yet, the earliest first.

    A checkpoint that is not whole, or that the run deletes before it is read, is passed over and
    named.

    Args:
        run: its folder. tasks, settings, options, roles, layout, model_options: as `evaluate`.
        out: a folder; what was measured there before stays.
        follow: go on with checkpoints as they come, until that of the run's last step is measured.
        poll: seconds between two looks for new ones.
        say: takes lines of progress; None is silent.

    Raises:
        ValueError: no checkpoint could be measured; a task, setting or example is wrong.
    """
    run, out, options = Path(run), Path(out), options or Options()
    if not run.is_dir() or not (follow or steps(run / CHECKPOINTS)):
        raise ValueError(f"{run / CHECKPOINTS}: holds no checkpoint; give the folder of a run")
    built = build(tasks, settings or {}, options.seed)
    asked = _asked(built, options, roles or {}, model_options)
    work = _Work(run, out, built, asked, options, roles or {}, layout, say, model_options)
    last, passed = _last_step(run) if follow else None, set()
    while True:
        found = work.found()
        waiting = [step for step in work.waiting(found) if step not in passed]
        if waiting:
            if not work.take(found, waiting[0], len(waiting)):
                passed.add(waiting[0])
        elif follow and not _ended(found, passed, last):
            time.sleep(poll)
        elif found.points:
            return found
        else:
            raise ValueError(f"{run / CHECKPOINTS}: none of {sorted(passed)} could be measured")


@dataclass(frozen=True)
class _Work:
    """What a sweep does with each checkpoint."""

    run: Path
    out: Path
    tasks: Sequence[Task]
    asked: Mapping[str, str]
    options: Options
    roles: Mapping[Role, Model]
    layout: Layout | None
    say: Say | None
    model_options: Mapping[str, Any]

    def found(self) -> Sweep:
        """What was measured so far."""
        there = (self.out / FILE).is_file()
        return read_sweep(self.out) if there else Sweep(self.run.name)

    def waiting(self, found: Sweep) -> list[int]:
        """Steps of the run that are to be measured."""
        points = {point.step: point for point in found.points}
        every = steps(self.run / CHECKPOINTS)
        return [step for step in every if not self._there(step, points.get(step))]

    def take(self, found: Sweep, step: int, left: int) -> bool:
        """Measure a checkpoint and write it down; whether that could be done."""
        name = step_name(step)
        tell = self.say or (lambda line: None)
        tell(f"checkpoint {name}, {left} to measure")
        commit = _commit(self._checkpoint(step))
        trouble = self._measure(self._checkpoint(step))
        if trouble is not None:
            tell(f"checkpoint {name} passed over: {trouble}")
            return False
        new = _with(found, self.run, step, commit, self.asked)
        write_json(self.out / FILE, {"format": FORMAT, **plain(dataclasses.asdict(new))})
        return True

    def _checkpoint(self, step: int) -> Path:
        return self.run / CHECKPOINTS / step_name(step)

    def _there(self, step: int, point: Point | None) -> bool:
        if point is None or point.commit != _commit(self._checkpoint(step)):
            return False
        if any(point.asked.get(name) != digest for name, digest in self.asked.items()):
            return False
        folder = self.out / step_name(step)
        if not (folder / results.RESULTS).is_file():
            return False
        return self.asked.keys() <= results.read(folder)["tasks"].keys()

    def _measure(self, checkpoint: Path) -> str | None:
        """Evaluate a checkpoint; why it could not be read, or None."""
        trouble = problem(checkpoint, (PARAMS,), read=False)
        if trouble is not None:
            return trouble
        try:
            backend = InProcess(checkpoint, self.layout, **self.model_options)
        except Exception as error:
            if checkpoint.is_dir() and not isinstance(error, CheckpointError):
                raise
            return str(error) if checkpoint.is_dir() else "it was deleted meanwhile"
        try:
            backend.name = checkpoint.name
            evaluate(
                backend,
                self.tasks,
                out=self.out,
                options=self.options,
                roles=self.roles,
                say=self.say,
            )
        finally:
            backend.close()
        return None


def _asked(
    tasks: Sequence[Task],
    options: Options,
    roles: Mapping[Role, Model],
    model_options: Mapping[str, Any],
) -> dict[str, str]:
    """A hash for each task, of all that its result depends on beside the checkpoint."""
    named = {role: getattr(model, "identity", str(model)) for role, model in roles.items()}
    shared = {
        "options": dataclasses.asdict(options),
        "model": {name: str(value) for name, value in model_options.items()},
        **({"roles": named} if named else {}),
        "code": code_fingerprint(),
    }
    found = {}
    for task in tasks:
        own = {"version": task.version, "settings": dict(task.settings)}
        data = data_hash(task.examples())
        found[task.name] = sha256(canonical(plain({**shared, **own, "data": data})))
    return found


def _last_step(run: Path) -> int | None:
    """The step that training ends with, if the run says it."""
    try:
        return int(read_json(RunFolder(run).config)["train"]["steps"])
    except (CheckpointError, KeyError, TypeError):
        return None


def _ended(found: Sweep, passed: set[int], last: int | None) -> bool:
    known = [*passed, *(point.step for point in found.points)]
    return last is not None and max(known, default=-1) >= last


def _commit(checkpoint: Path) -> str:
    """Hash of what lists a checkpoint's files; "" where it is not there."""
    try:
        return sha256((checkpoint / COMMIT).read_bytes())
    except OSError:
        return ""


def _with(found: Sweep, run: Path, step: int, commit: str, asked: Mapping[str, str]) -> Sweep:
    """The sweep with one point more, or a newer one of its step."""
    earlier = next((each for each in found.points if each.step == step), None)
    known = earlier.asked if earlier is not None and earlier.commit == commit else {}
    point = Point(step, tokens_seen(run).get(step), commit, {**known, **asked})
    points = [point, *(each for each in found.points if each.step != step)]
    return Sweep(run.name, tuple(sorted(points, key=lambda each: each.step)), incidents_of(run))


def tokens_seen(run: Path) -> dict[int, int]:
    """Step -> tokens of all steps until then, as far as the run's metrics have every step."""
    found, total = {}, 0
    for expected, row in enumerate(json_lines.read(RunFolder(run).metrics), start=1):
        if row.get("step") != expected or "tokens" not in row:
            break
        total += int(row["tokens"])
        found[expected] = total
    return found


def incidents_of(run: Path) -> tuple[tuple[int, str], ...]:
    """What shook the run, `(step, kind)`, at the step where it began."""
    rows = json_lines.read(RunFolder(run).incidents)
    found = [(row.get("onset", row.get("step")), row["kind"]) for row in rows]
    return tuple((int(step), kind) for step, kind in found if kind in EVENTS and step is not None)


def read_sweep(folder: str | Path) -> Sweep:
    """What stands in a folder's `sweep.json`. Raises `ValueError` that names the file."""
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        points = tuple(Point(**each) for each in content["points"])
        incidents = tuple((int(step), str(kind)) for step, kind in content["incidents"])
        return Sweep(content["run"], points, incidents)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `python -m evals sweep` writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not what a sweep writes ({error})") from None
