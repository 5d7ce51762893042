"""What tasks share whose answers are programs: cutting completions, running samples, pass@k."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from evals.extract import fenced
from evals.metrics import pass_at_k
from evals.stats import mean, proportion
from evals.task import Context, Estimate, Example, Executed, Generate, Row

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a function's body (Chen et al. 2021, arXiv 2107.03374)."""


def ask(context: Context, prompt: str, samples: int, **options: Any) -> Generate:
    """One request for all samples of a problem, with the seed of its place."""
    return context.ask(prompt, n=samples, seed=context.sample_seed(), **options)


def cut(completion: str, stops: Sequence[str] = STOPS) -> str:
    """A completion up to the first of the stops."""
    found = [completion.find(stop) for stop in stops]
    ends = [place for place in found if place >= 0]
    return completion[: min(ends)] if ends else completion


def defines(source: str, name: str) -> bool:
    """Whether a text has the top-level function `name`."""
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", source, re.MULTILINE) is not None


def whole_program(prompt: str, answer: str, entry_point: str, chat: bool) -> str:
    """The program that a prompt, which ends inside a function, and an answer make.

    A chat's answer is the code of its first fenced block, or all of it. Where that defines the
    function anew, only what stands before the function in the prompt (imports, helpers) is kept.
    """
    if not chat:
        return prompt + cut(answer)
    code = fenced(answer)
    code = answer if code is None else code
    if not defines(code, entry_point):
        return prompt + code
    found = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return (prompt[: found.start()] if found else "") + code


def row(executed: Sequence[Executed], programs: Sequence[str]) -> Row:
    """A problem's row: the share of samples that passed, how each ended, why the first failed."""
    passed = [run.status == "passed" for run in executed]
    weaker = sorted({wall for run in executed for wall in run.weaker})
    return {
        "samples": len(passed),
        "passed": sum(passed),
        "score": sum(passed) / len(passed),
        "statuses": [run.status for run in executed],
        "parsed": programs[0],
        "reason": "" if passed[0] else executed[0].stderr[-1000:],
        **({"weaker_sandbox": weaker} if weaker else {}),
    }


def pass_at(rows: Sequence[Row], ks: Sequence[int]) -> dict[str, Estimate]:
    """pass@k for each k that there are enough samples for, and the share of samples that hit a
    limit; errors are over problems.
    """
    most = min(row["samples"] for row in rows)
    found = {}
    for k in ks:
        if k <= most:
            values = [pass_at_k(row["samples"], row["passed"], k) for row in rows]
            found[f"pass@{k}"] = proportion(values) if most == 1 else mean(values)
    ends = [sum(end != "failed" and end != "passed" for end in row["statuses"]) for row in rows]
    shares = [count / row["samples"] for count, row in zip(ends, rows, strict=True)]
    return {**found, "over_limits": mean(shares)}


def identified(examples: Sequence[Example]) -> list[Example]:
    """Rows with their `task_id` as their id."""
    return [{**example, "id": str(example["task_id"])} for example in examples]
