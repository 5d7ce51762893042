"""What an evaluation leaves in its folder, and reads again.

OUT/requests.sqlite              every answer, for the next time
OUT/MODEL/results.json           estimates by task, and what they are of; no times, so that equal
                                 evaluations have equal bytes
OUT/MODEL/TASK/rows.jsonl        a row an example: id, prompt, outputs, score
OUT/MODEL/work.json              what it took: seconds, requests, tokens
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.runner import TaskResult
from evals.task import Estimate, Row
from model.checkpoint_folder import write_bytes, write_json
from training.json_lines import plain

RESULTS, ROWS, WORK = "results.json", "rows.jsonl", "work.json"
FORMAT = 1
Results = dict[str, Any]


def folder_name(name: str) -> str:
    """A model's or task's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_.@" else "_" for c in name).strip(".") or "_"


def write(
    folder: Path,
    model: Mapping[str, Any],
    options: Mapping[str, Any],
    results: Sequence[TaskResult],
    work: Mapping[str, Any],
) -> Results:
    """Write the files of one model; what stands in `results.json`. Tasks that are there from an
    earlier evaluation of the same model and options stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "model": dict(model), "options": dict(options)}
    tasks = _earlier(folder, head)
    for each in results:
        rows = folder / folder_name(each.task.name)
        rows.mkdir(exist_ok=True)
        lines = [json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in each.rows]
        write_bytes(rows / ROWS, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
        tasks[each.task.name] = _task(each)
    content = {**head, "tasks": {name: tasks[name] for name in sorted(tasks)}}
    write_json(folder / RESULTS, plain(content))
    write_json(folder / WORK, plain(work))
    return read(folder)


def _earlier(folder: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return {}
    same = all(found.get(key) == value for key, value in plain(head).items())
    return found["tasks"] if same else {}


def _task(result: TaskResult) -> dict[str, Any]:
    task, rows = result.task, result.rows
    outcomes = [row["outcome"] for row in rows if "outcome" in row]
    unparsed = outcomes.count("unparsed") / len(outcomes) if outcomes else None
    chances = [row["chance"] for row in rows if "chance" in row]
    return {
        "version": task.version,
        "licence": task.licence,
        "place": dataclasses.asdict(task.place),
        "settings": dict(task.settings),
        "data": result.data,
        "shots": result.shots,
        "examples": len(rows),
        "unparsed": unparsed,
        "chance": math.fsum(chances) / len(chances) if chances else None,
        "cut_contexts": sum(row.get("cut", 0) for row in rows),
        "estimates": {name: vars(each) for name, each in result.estimates.items()},
    }


def read(folder: str | Path) -> Results:
    """`results.json`, its estimates as `Estimate`. Raises `ValueError` naming file and field."""
    path = Path(folder) / RESULTS
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder of one model's results") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if found.get("format") != FORMAT or "tasks" not in found or "model" not in found:
        raise ValueError(f"{path}: needs format {FORMAT}, model and tasks")
    for name, task in found["tasks"].items():
        try:
            estimates = {key: _estimate(value) for key, value in task["estimates"].items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: tasks.{name}.estimates: {error}") from None
        task["estimates"] = estimates
    return found


def _estimate(value: Mapping[str, Any]) -> Estimate:
    numbers = {name: float(value[name]) for name in ("value", "se", "low", "high")}
    return Estimate(**numbers, n=value["n"], method=value["method"], unit=value["unit"])


def read_rows(folder: str | Path, task: str) -> list[Row]:
    """The rows of a task. Raises `ValueError` that names file and line."""
    path = Path(folder) / folder_name(task) / ROWS
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def show(estimate: Estimate) -> str:
    """`0.7107 ± 0.0144 (0.6818 to 0.7380)`."""
    text = f"{estimate.value:.4f}"
    if math.isnan(estimate.se):
        return text
    return f"{text} ± {estimate.se:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
