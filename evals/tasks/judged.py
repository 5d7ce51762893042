"""Open questions whose answers a judge reads: against another answer, on a scale, or by a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from evals.examples import read_examples
from evals.judges import (
    CRITERION,
    Judge,
    Preference,
    flip_rate,
    length_preference,
    position_share,
    win_rate,
)
from evals.stats import clustered, mean, proportion
from evals.task import Context, Coroutine, Estimate, Example, Row, Task
from evals.taxonomy import Place

NEEDS = {"pairwise": ("prompt", "answer"), "pointwise": ("prompt",),
         "checklist": ("prompt", "requirements")}  # fmt: skip
PLACE = Place("alignment", "general", "open questions", evaluation="ME")
WORTH = {"first": 1.0, "tie": 0.5}


def judged(
    path: str,
    mode: Literal["pairwise", "pointwise", "checklist"] = "pairwise",
    max_tokens: int = 512,
    criterion: str = CRITERION,
    lowest: int = 1,
    highest: int = 5,
    judge_chat: bool = True,
) -> Task:
    """Answers to the prompts of a file, as a judge (`--judge`) sees them.

    mode: `pairwise` against each row's `answer`, `pointwise` on a scale from `lowest` to `highest`
    by a criterion, `checklist` by each row's list of `requirements`. judge_chat: the judge is asked
    in messages. What the judge does not say readably counts as lost, worst, or not kept.
    """

    def run(example: Example, context: Context) -> Coroutine:
        question, judge = str(example["prompt"]), Judge(context, judge_chat)
        [answer] = yield [context.ask(question, max_tokens=max_tokens)]
        said = answer.texts[0]
        if mode == "pairwise":
            other = str(example["answer"])
            return compared(said, other, (yield from judge.pairwise(question, said, other)))
        if mode == "pointwise":
            scale = (lowest, highest)
            given = yield from judge.pointwise(question, said, criterion, scale)
            return {"parsed": given, "score": float(lowest if given is None else given)}
        asked = [str(each) for each in example["requirements"]]
        kept = yield from judge.checklist(question, said, asked)
        found = kept or (False,) * len(asked)
        row = {"parsed": kept, "kept": [*map(float, found)]}
        return {**row, "score": sum(found) / len(found)}

    aggregate = {"pairwise": preferences, "pointwise": grades, "checklist": kept_shares}[mode]
    return Task(
        name="judged",
        version="1",
        licence="of the file",
        place=PLACE,
        examples=lambda: read_examples(path, NEEDS[mode]),
        run=run,
        aggregate=aggregate,
    )


def compared(said: str, other: str, found: Preference) -> Row:
    """The row of a pair; the texts' lengths are for the judge's preference of long ones."""
    return {
        "gold": other,
        "parsed": None if found.winner == "unparsed" else found.winner,
        "score": WORTH.get(found.winner, 0.0),
        "shown": found.shown,
        "lengths": (len(said), len(other)),
    }


def preferences(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of wins, and what is known of the judge: verdicts that go by the place, first
    places and longer answers among the winners, and verdicts that could not be read.
    """
    winners: list[Any] = [row["parsed"] or "unparsed" for row in rows]
    shown = [each for row in rows for each in row["shown"]]
    found = [Preference(w, tuple(row["shown"])) for w, row in zip(winners, rows, strict=True)]
    return {
        "win_rate": win_rate(winners),
        "flip_rate": flip_rate(found),
        "position_share": position_share(shown),
        "length_preference": length_preference([tuple(row["lengths"]) for row in rows], winners),
        "unparsed": _unparsed(rows),
    }


def grades(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The mean grade, and the share of grades that could not be read."""
    return {"score": mean([row["score"] for row in rows]), "unparsed": _unparsed(rows)}


def kept_shares(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Shares of requirements that are kept, and of answers that keep all of theirs."""
    values = [value for row in rows for value in row["kept"]]
    clusters = [row["id"] for row in rows for _ in row["kept"]]
    return {
        "kept": clustered(values, clusters),
        "all_kept": proportion([float(all(row["kept"])) for row in rows]),
        "unparsed": _unparsed(rows),
    }


def _unparsed(rows: Sequence[Row]) -> Estimate:
    return proportion([float(row["parsed"] is None) for row in rows])
