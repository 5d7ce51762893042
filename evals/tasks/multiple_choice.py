"""Multiple choice from a file: by letter, or by the whole text of each option.

A row is `{"question", "options": [...], "answer": place, letter or option}`, maybe `"id"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from evals.examples import read_examples
from evals.task import Context, Coroutine, Example, Task, no_examples
from evals.tasks.options import accuracies, gold_index, picks, requests
from evals.taxonomy import Place

NEEDS = ("question", "options", "answer")


def multiple_choice(
    path: str,
    style: Literal["letter", "text"] = "text",
    calibrated: bool = True,
    fewshot: str = "",
    shots: int = 0,
) -> Task:
    """Questions with options.

    style: `letter` lists the options and scores their letters, `text` scores the options
    themselves. calibrated: with `text`, also score options after nothing (`acc_mi`). fewshot: a
    file of questions to show; without one those of the task itself, but the one asked.
    """

    def examples() -> Sequence[Example]:
        return read_examples(path, NEEDS)

    def run(example: Example, context: Context) -> Coroutine:
        options = [str(option) for option in example["options"]]
        gold = gold_index(example["answer"], options)
        shown = "".join(f"{_solved(each, style)}\n\n" for each in context.fewshot)
        texts = [f" {text}" for text in _answers(options, style)]
        asked = requests(shown + _question(example, style), texts, calibrated and style == "text")
        answers = yield asked
        found = picks(texts, answers)
        outcome = "correct" if found["acc"] == gold else "incorrect"
        return {"gold": gold, "picks": found, "outcome": outcome, "chance": 1 / len(options)}

    return Task(
        name="multiple_choice",
        version="1",
        licence="of the file",
        place=Place("knowledge and capability", "question answering", answer="SQ"),
        examples=examples,
        run=run,
        aggregate=accuracies,
        fewshot=(lambda: read_examples(fewshot or path, NEEDS))
        if fewshot or shots
        else no_examples,
        shots=shots,
    )


def _answers(options: Sequence[str], style: str) -> list[str]:
    if style == "text":
        return list(options)
    if len(options) > 26:
        raise ValueError(f"{len(options)} options; letters stand for 26 at most")
    return [chr(65 + place) for place in range(len(options))]


def _question(example: Example, style: str) -> str:
    lines = [f"Question: {example['question']}"]
    if style == "letter":
        options = zip(_answers(example["options"], style), example["options"], strict=True)
        lines += [f"{letter}. {option}" for letter, option in options]
    return "\n".join([*lines, "Answer:"])


def _solved(example: Example, style: str) -> str:
    options = [str(option) for option in example["options"]]
    answer = _answers(options, style)[gold_index(example["answer"], options)]
    return f"{_question(example, style)} {answer}"
