"""Two models' results on the same examples: paired differences, with tests held against chance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals import results
from evals.stats import DRAWS, Comparison, compare, holm
from evals.task import Row


@dataclass(frozen=True)
class Compared:
    """A task on both models. metric: what was compared. p: adjusted by Holm over the whole table.
    flipped: ids of examples of which one model got more, the largest differences first.
    """

    task: str
    metric: str
    comparison: Comparison
    p: float
    flipped: tuple[str, ...]


def compare_folders(first: str | Path, second: str | Path) -> list[Compared]:
    """Compare the tasks that two folders of results share, second minus first.

    Raises `ValueError` if they share none, or a task ran on other examples.
    """
    names = [sorted(results.read(folder)["tasks"]) for folder in (first, second)]
    shared = [name for name in names[0] if name in names[1]]
    if not shared:
        raise ValueError(
            f"{first} and {second} share no task: {', '.join(names[0])}; {', '.join(names[1])}"
        )
    return corrected([compare_task(first, second, name) for name in shared])


def compare_task(first: str | Path, second: str | Path, name: str, draws: int = DRAWS) -> Compared:
    """Compare one task, second minus first; its p is not adjusted yet.

    draws: of the bootstrap, whose p is never below `2 / (draws + 1)`. Raises `ValueError` if it ran
    on other examples.
    """
    rows = [results.read_rows(folder, name) for folder in (first, second)]
    _check_ids(name, first, second, rows)
    metric, values = scores(rows)
    gaps = values[1] - values[0]
    order = np.argsort(-np.abs(gaps), kind="stable")
    flipped = tuple(str(rows[0][i]["id"]) for i in order if gaps[i] != 0)
    found = compare(values[0], values[1], draws=draws)
    return Compared(name, metric, found, found.p, flipped)


def corrected(compared: Sequence[Compared]) -> list[Compared]:
    """The comparisons of one table, with p-values adjusted by Holm over all of them."""
    adjusted = holm([each.comparison.p for each in compared])
    return [dataclasses.replace(each, p=p) for each, p in zip(compared, adjusted, strict=True)]


def draws_for(tests: int) -> int:
    """Bootstrap draws with which one of so many tests can still be significant after Holm: the
    least p, `2 / (draws + 1)`, times the tests stays below 0.0125.
    """
    return max(DRAWS, 160 * tests)


def _check_ids(name: str, first: str | Path, second: str | Path, rows: Sequence[list[Row]]) -> None:
    ids = [[str(row["id"]) for row in each] for each in rows]
    if ids[0] != ids[1]:
        odd = sorted(set(ids[0]) ^ set(ids[1]))
        what = f"only one of them has example {odd[0]}" if odd else "their order differs"
        raise ValueError(
            f"task {name}: {first} and {second} ran on other examples ({len(ids[0])} and "
            f"{len(ids[1])}; {what}); evaluate both with the same data and limit"
        )


def scores(rows: Sequence[Sequence[Row]]) -> tuple[str, list[np.ndarray]]:
    """What is compared, and its value for each row of each model: 1 for a right answer, else bits
    per byte of a document, or a `score`.
    """
    example = rows[0][0]
    if "nats" in example and "bytes" in example:
        bits = [[r["nats"] / (max(r["bytes"], 1) * math.log(2)) for r in each] for each in rows]
        return "bits_per_byte", [np.asarray(each) for each in bits]
    for name in ("outcome", "score"):
        if name in example:
            return name, [np.asarray([_value(row[name]) for row in each]) for each in rows]
    raise ValueError(f"rows have neither an outcome nor a score; they have {', '.join(example)}")


def _value(given: str | float) -> float:
    return float(given == "correct") if isinstance(given, str) else float(given)


def headline(task: Mapping[str, Any]) -> str:
    """The metric that stands for a task of `results.json`: the first it gives, which is what
    `scores` compares.
    """
    return next(iter(task["estimates"]))


def lower_is_better(metric: str) -> bool:
    """Whether a metric counts what is lost."""
    return any(part in metric for part in ("bits_per_byte", "perplexity", "nats"))


def table(compared: Sequence[Compared]) -> str:
    """The comparisons as Markdown; `*` marks p < 0.05 after Holm."""
    lines = [
        "| task | compared | first | second | difference | 95 % | better / worse | p (Holm) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in compared:
        c, mark = each.comparison, "*" if each.p < 0.05 else ""
        lines.append(
            f"| {each.task} | {each.metric} | {c.first:.4f} | {c.second:.4f} | "
            f"{c.difference:+.4f} ± {c.se:.4f}{mark} | {c.low:+.4f} to {c.high:+.4f} | "
            f"{c.better} / {c.worse} | {each.p:.3g} |"
        )
    return "\n".join(lines)


def summary(found: Mapping[str, results.Results]) -> str:
    """The estimates of models as Markdown, a column a model."""
    names = list(found)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model, each in found.items():
        for task, content in each["tasks"].items():
            for metric, estimate in content["estimates"].items():
                rows.setdefault((task, metric), {})[model] = results.show(estimate)
    lines = [f"| task | metric | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for (task, metric), values in rows.items():
        cells = " | ".join(values.get(name, "") for name in names)
        lines.append(f"| {task} | {metric} | {cells} |")
    return "\n".join(lines)
