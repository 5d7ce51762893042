"""A sweep read along its steps: how each task's score goes, and where it falls.

for curve in curves("out"):
    print(curve.task, curve.trend, curve.emerges, [point.step for point in curve.falls])
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals import results
from evals.comparing import (
    Compared,
    compare_task,
    corrected,
    draws_for,
    headline,
    lower_is_better,
)
from evals.metrics import spearman
from evals.sweep import Point, read_sweep
from evals.task import Estimate
from model.checkpoint_folder import step_name

LEVEL = 0.05
STAYS = 3
"""Checkpoints in a row that are no accident, and fewest that a correlation is given for."""


@dataclass(frozen=True)
class Curve:
    """A task's first metric over the checkpoints that have it.

    points, estimates: one a checkpoint. changes: against the checkpoint before, the first is None;
    p adjusted by Holm over all tasks and steps of the sweep. trend: Spearman's correlation of value
    and step, which is that of value and log tokens. chance: what guessing scores; None of what is
    lost (bits a byte).
    """

    task: str
    metric: str
    points: tuple[Point, ...]
    estimates: tuple[Estimate, ...]
    changes: tuple[Compared | None, ...]
    trend: float
    chance: float | None = None

    @property
    def emerges(self) -> Point | None:
        """The first of `STAYS` checkpoints in a row whose whole intervals lie above chance."""
        if self.chance is None:
            return None
        above = [estimate.low > self.chance for estimate in self.estimates]
        runs = range(len(above) - STAYS + 1)
        return next((self.points[i] for i in runs if all(above[i : i + STAYS])), None)

    @property
    def falls(self) -> list[Point]:
        """Checkpoints that are significantly worse than the one before."""
        return [
            point
            for point, change in zip(self.points, self.changes, strict=True)
            if change is not None and change.p < LEVEL and worse(change)
        ]


def worse(compared: Compared) -> bool:
    """Whether the second model did worse."""
    return (compared.comparison.difference > 0) == lower_is_better(compared.metric)


def curves(folder: str | Path) -> list[Curve]:
    """The curves of a sweep, in order of the tasks' names.

    Neighbours are compared where they ran on the same examples. Raises `ValueError` for a folder
    that is no sweep's.
    """
    folder = Path(folder)
    points = read_sweep(folder).points
    found = {point.step: results.read(folder / step_name(point.step)) for point in points}
    tasks = sorted({name for each in found.values() for name in each["tasks"]})
    having = {name: [p for p in points if name in found[p.step]["tasks"]] for name in tasks}
    pairs = [
        (name, before, after)
        for name, mine in having.items()
        for before, after in itertools.pairwise(mine)
        if _data(found[before.step], name) == _data(found[after.step], name)
    ]
    draws = draws_for(len(pairs))
    tests = [
        compare_task(folder / step_name(before.step), folder / step_name(after.step), name, draws)
        for name, before, after in pairs
    ]
    changes = {
        (name, after.step): each
        for (name, _, after), each in zip(pairs, corrected(tests), strict=True)
    }
    return [
        _curve(name, mine, [found[p.step]["tasks"][name] for p in mine], changes)
        for name, mine in having.items()
    ]


def _data(found: results.Results, name: str) -> tuple[str, int]:
    task = found["tasks"][name]
    return task["data"], task["examples"]


def _curve(
    name: str,
    points: Sequence[Point],
    tasks: Sequence[results.Results],
    changes: dict[tuple[str, int], Compared],
) -> Curve:
    metric = headline(tasks[0])
    estimates = tuple(task["estimates"][metric] for task in tasks)
    trend = spearman([p.step for p in points], [each.value for each in estimates])
    after = tuple(changes.get((name, point.step)) for point in points)
    chance = None if lower_is_better(metric) else tasks[-1].get("chance") or 0.0
    return Curve(name, metric, tuple(points), estimates, after, trend, chance)


def correlations(found: Sequence[Curve]) -> dict[tuple[str, str], float]:
    """Spearman's correlation of each two tasks' values over the checkpoints that have both; nan of
    fewer than three.
    """
    values = {
        curve.task: {p.step: e.value for p, e in zip(curve.points, curve.estimates, strict=True)}
        for curve in found
    }
    pairs = {}
    for one, other in itertools.combinations(values, 2):
        steps = sorted(values[one].keys() & values[other].keys())
        sides = [[values[task][step] for step in steps] for task in (one, other)]
        pairs[one, other] = spearman(*sides) if len(steps) >= STAYS else math.nan
    return pairs


def correlation_table(found: Sequence[Curve]) -> str:
    """`correlations` as Markdown."""
    pairs, names = correlations(found), [curve.task for curve in found]
    lines = [f"| Spearman | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for one in names:
        cells = [
            "" if one == other else f"{pairs.get((one, other), pairs.get((other, one))):+.2f}"
            for other in names
        ]
        lines.append(f"| {one} | {' | '.join(cells)} |")
    return "\n".join(lines)


def matrix(found: Sequence[Curve]) -> str:
    """Checkpoints by tasks as Markdown; `!` marks a score worse than the one before, p < 0.05 after
    Holm.
    """
    steps = sorted({point.step for curve in found for point in curve.points})
    lines = [
        f"| step | {' | '.join(f'{curve.task} {curve.metric}' for curve in found)} |",
        "|---|" + "---|" * len(found),
    ]
    cells = [
        {
            point.step: results.show(each) + ("!" if point in curve.falls else "")
            for point, each in zip(curve.points, curve.estimates, strict=True)
        }
        for curve in found
    ]
    for step in steps:
        lines.append(f"| {step} | {' | '.join(each.get(step, '') for each in cells)} |")
    trends = " | ".join(f"trend {curve.trend:+.2f}{_since(curve)}" for curve in found)
    return "\n".join([*lines, f"| all | {trends} |"])


def _since(curve: Curve) -> str:
    return "" if curve.emerges is None else f", above chance from {curve.emerges.step}"
