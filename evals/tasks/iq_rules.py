"""IQ suite, rule understanding: counting on, and replacing words."""

from __future__ import annotations

import numpy as np

from evals.task import Task
from evals.tasks.iq import WORDS, generated, pick, show

SHOTS = 4


def counting(samples: int = 300, most: int = 100_000, seed: int = 0) -> Task:
    """Count from a, which is `most` at most, to b: what comes after the first three, in order."""

    def make(rng: np.random.Generator) -> tuple[str, str]:
        start = int(rng.integers(most + 1))
        numbers = [str(start + i) for i in range(int(rng.integers(7, 13)))]
        prompt = f"Count from {numbers[0]} to {numbers[-1]}: {', '.join(numbers[:3])},"
        return prompt, ", ".join(numbers[3:])

    return generated("iq_counting", make, seed, samples, 128, "rule understanding")


def string_replacement(samples: int = 300, case: bool = False, seed: int = 0) -> Task:
    """Replace every occurrence of a word by another in a sentence of random words, after four
    examples. case: write the word that is all capitals small instead.
    """

    def make(rng: np.random.Generator) -> tuple[str, str]:
        old, new = pick(rng, WORDS, 2)
        pairs = [_pair(rng, old, new, case) for _ in range(SHOTS + 1)]
        rule = "Write words in capitals small." if case else f"Replace {old} by {new}."
        return f"{rule}\n\n{show(pairs[:-1], pairs[-1][0])}", pairs[-1][1]

    return generated("iq_string_replacement", make, seed, samples, 64, "rule understanding")


def _pair(rng: np.random.Generator, old: str, new: str, case: bool) -> tuple[str, str]:
    words = pick(rng, [word for word in WORDS if word not in (old, new)], 6)
    for at in rng.permutation(6)[: int(rng.integers(1, 3))]:
        words[at] = old
    given = [word.upper() if case and word == old else word for word in words]
    wanted = [new if not case and word == old else word for word in words]
    return " ".join(given), " ".join(wanted)
