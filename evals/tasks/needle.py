"""Passkey retrieval: a number hidden in filler of any length, at any depth (Mohtashami and Jaggi
2023, arXiv 2305.16300). Generated; equal seeds give equal texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from evals.stats import proportion
from evals.task import Context, Coroutine, Estimate, Example, Row, Task
from evals.taxonomy import Place

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
INTRODUCTION = (
    "There is important information hidden inside a lot of irrelevant text. Find it and memorise "
    "it.\n"
)


def needle(
    words: tuple[int, ...] = (100, 400, 1600),
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    digits: int = 5,
    seed: int = 0,
) -> Task:
    """`samples` keys of `digits` digits for each number of filler words and each depth, from 0
    (the beginning) to 1.
    """

    def examples() -> Sequence[Example]:
        return [
            {"id": f"{count}-{depth:g}-{sample}", "words": count, "depth": depth,
             "key": _key(seed, count, depth, sample, digits)}
            for count, depth, sample in itertools.product(words, depths, range(samples))
        ]  # fmt: skip

    def run(example: Example, context: Context) -> Coroutine:
        prompt = text(example["words"], example["depth"], example["key"])
        [answer] = yield [context.ask(prompt, max_tokens=4 * digits, until=("\n",))]
        given = "".join(filter(str.isdigit, answer.texts[0]))[:digits]
        outcome = "correct" if given == example["key"] else "incorrect" if given else "unparsed"
        row = {"gold": example["key"], "parsed": given or None, "outcome": outcome}
        return {**row, "words": example["words"], "depth": example["depth"]}

    return Task(
        name="needle",
        version="1",
        licence="generated",
        place=Place("knowledge and capability", "reasoning", "retrieval from long texts"),
        examples=examples,
        run=run,
        aggregate=aggregate,
    )


def _key(seed: int, words: int, depth: float, sample: int, digits: int) -> str:
    rng = np.random.default_rng((seed, words, round(1000 * depth), sample))
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def text(words: int, depth: float, key: str) -> str:
    """The prompt: whole sentences of about `words` words of filler around the key."""
    sentences = FILLER.split(". ")[:-1]
    filler = list(itertools.islice(itertools.cycle(sentences), max(1, round(words / 4))))
    at = round(depth * len(filler))
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key"
    body = ". ".join([*filler[:at], hidden, *filler[at:]])
    return f"{INTRODUCTION}{body}.\nWhat is the pass key? The pass key is"


def aggregate(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Shares of keys found: in all, by length, and by length and depth."""
    found = {"acc": _share(rows)}
    for words in sorted({row["words"] for row in rows}):
        mine = [row for row in rows if row["words"] == words]
        found[f"acc/{words}"] = _share(mine)
        for depth in sorted({row["depth"] for row in mine}):
            found[f"acc/{words}/{depth:g}"] = _share([r for r in mine if r["depth"] == depth])
    return found


def _share(rows: Sequence[Row]) -> Estimate:
    return proportion([float(row["outcome"] == "correct") for row in rows])
