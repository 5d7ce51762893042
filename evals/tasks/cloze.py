"""Cloze: the last word of each text, from all before it (as LAMBADA; Paperno et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evals.examples import read_examples
from evals.stats import mean, proportion, transformed
from evals.task import Context, Coroutine, Estimate, Example, Loglikelihood, Row, Task
from evals.taxonomy import Place


def cloze(path: str, text_key: str = "text") -> Task:
    """JSON lines; a text's last word is what stands behind its last space."""

    def run(example: Example, context: Context) -> Coroutine:
        before, _, word = str(example[text_key]).rstrip().rpartition(" ")
        if not before.strip():
            raise ValueError("its text has fewer than two words")
        [found] = yield [Loglikelihood(before, f" {word}")]
        outcome = "correct" if found.greedy else "incorrect"
        return {"gold": word, "nats": -found.logprob, "outcome": outcome}

    return Task(
        name="cloze",
        version="1",
        licence="of the text",
        place=Place("knowledge and capability", "language modelling", "last word"),
        examples=lambda: read_examples(path, (text_key,)),
        run=run,
        aggregate=aggregate,
    )


def aggregate(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of words that are the likeliest token by token, and the words' perplexity."""
    return {
        "acc": proportion([float(row["outcome"] == "correct") for row in rows]),
        "word_perplexity": transformed(mean([row["nats"] for row in rows]), math.exp),
    }
