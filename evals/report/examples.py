"""The examples that a report carries: prompt, right answer, and what each model made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from evals import results
from evals.comparing import scores
from evals.report.contents import Model
from evals.report.markup import Markup
from evals.task import Row

CHARACTERS = 2000
"""Of an answer on the page."""


def example_data(models: Sequence[Model], most: int = 500) -> dict[str, Any]:
    """What the page's script reads: `models`, `tasks` with how many examples are shown of how many,
    and `rows`. Of a task with more than `most` those come first on which models differ.
    """
    names = sorted({name for model in models for name in model.results["tasks"]})
    tasks, rows = [], []
    for number, name in enumerate(names):
        found = _task(name, models)
        rows += [{"task": number, **each} for each in found[:most]]
        tasks.append({"name": name, "shown": min(most, len(found)), "total": len(found)})
    return {"models": [model.label for model in models], "tasks": tasks, "rows": rows}


def _task(name: str, models: Sequence[Model]) -> list[dict[str, Any]]:
    """A task's examples, those on which models differ first, the largest differences before."""
    having = [
        {str(row["id"]): row for row in results.read_rows(model.folder, name)}
        if name in model.results["tasks"]
        else {}
        for model in models
    ]
    ids = dict.fromkeys(identity for rows in having for identity in rows)
    groups = [(each, [rows.get(each) for rows in having]) for each in ids]
    groups.sort(key=lambda group: (not _differ(group[1]), -_spread(group[1])))
    return [_example(*group) for group in groups]


def _example(identity: str, rows: Sequence[Row | None]) -> dict[str, Any]:
    there = [row for row in rows if row is not None]
    return {
        "id": identity,
        "prompt": there[0].get("prompt", ""),
        "gold": _text(there[0].get("gold")),
        "differ": _differ(rows),
        "of": [None if row is None else _shown(row) for row in rows],
    }


def _differ(rows: Sequence[Row | None]) -> bool:
    """Whether some models are right and others are not."""
    outcomes = {row["outcome"] == "correct" for row in rows if row and "outcome" in row}
    return len(outcomes) > 1


def _spread(rows: Sequence[Row | None]) -> float:
    values = [value for row in rows if row and (value := _value(row)) is not None]
    return max(values) - min(values) if values else 0.0


def _value(row: Row) -> float | None:
    try:
        return float(scores([[row]])[1][0][0])
    except ValueError:
        return None


def _shown(row: Row) -> dict[str, Any]:
    value = _value(row)
    plain = "outcome" not in row and value is not None
    return {
        "outcome": row.get("outcome"),
        "score": f"{value:.4f}" if plain else None,
        "parsed": _text(row.get("parsed")),
        "said": [_cut(text) for output in row.get("outputs", ()) for text in _said(output)],
    }


def _said(output: Any) -> list[str]:
    """An answer of the records as texts."""
    if not isinstance(output, Mapping):
        return [str(output)]
    if "texts" in output:
        ends = output.get("finish", ())
        return [
            text + (" [cut at the limit]" if end == "length" else "")
            for text, end in zip(output["texts"], ends, strict=False)
        ]
    if "continuation" in output:
        likeliest = ", the likeliest" if output["greedy"] else ""
        return [f"{output['logprob']:.3f}{likeliest}: {output['continuation']}"]
    if "bytes" in output:
        return [f"{-output['logprob']:.2f} nats over {output['bytes']} bytes"]
    return [json.dumps(output, ensure_ascii=False)]


def _text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    left = len(text) - CHARACTERS
    return text if left <= 0 else f"{text[:CHARACTERS]} [{left} characters more]"


def embedded(data: Mapping[str, Any]) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    return Markup(json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))
