"""What the tasks of FLM-101B's IQ suite share (Li et al. 2023, arXiv 2309.03852): generated
questions, asked by exact match. They reward reasoning in context and starve what was memorised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from evals.extract import first_line
from evals.task import Context, Coroutine, Example, Task
from evals.tasks.exact_match import outcomes
from evals.taxonomy import Place

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
WORDS = (
    "apple", "river", "stone", "cloud", "table", "horse", "garden", "window", "silver", "music",
    "paper", "bridge", "forest", "candle", "market", "winter", "summer", "castle", "island",
    "pencil", "mirror", "basket", "feather", "ladder", "pocket", "saddle", "tunnel", "velvet",
    "wagon", "anchor", "barrel", "copper",
)  # fmt: skip
Make = Callable[[np.random.Generator], tuple[str, str]]
"""Random numbers -> (prompt, answer)."""


def generated(
    name: str, make: Make, seed: int, samples: int, max_tokens: int, subcategory: str
) -> Task:
    """`samples` questions of `make`, question i from the seed and i alone; the first line of the
    answer must be the right one.
    """

    def examples() -> Sequence[Example]:
        made = [make(np.random.default_rng((seed, place))) for place in range(samples)]
        return [
            {"id": f"{seed}-{place}", "prompt": prompt, "answer": answer}
            for place, (prompt, answer) in enumerate(made)
        ]

    def run(example: Example, context: Context) -> Coroutine:
        asked = context.ask(example["prompt"], max_tokens=max_tokens, until=("\n",))
        [answer] = yield [asked]
        given = first_line(answer.texts[0])
        right = given == example["answer"]
        outcome = "unparsed" if given is None else "correct" if right else "incorrect"
        return {"gold": example["answer"], "parsed": given, "outcome": outcome}

    place = Place("knowledge and capability", "reasoning", subcategory)
    return Task(name, "1", "generated", place, examples, run, outcomes)


def random_text(rng: np.random.Generator, low: int = 5, high: int = 10) -> str:
    """Letters and digits in turn, so that a tokenizer cuts the text alike wherever it stands."""
    kinds = (LETTERS, DIGITS) if rng.integers(2) else (DIGITS, LETTERS)
    length = int(rng.integers(low, high + 1))
    return "".join(kinds[i % 2][rng.integers(len(kinds[i % 2]))] for i in range(length))


def pick(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """Different items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def show(pairs: Sequence[tuple[str, str]], query: str) -> str:
    """Solved examples, and one to solve."""
    solved = "".join(f"Input: {given}\nOutput: {answer}\n\n" for given, answer in pairs)
    return f"{solved}Input: {query}\nOutput:"
