"""IQ suite, pattern mining: five examples of a rule on random characters, and one to solve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evals.task import Task
from evals.tasks.iq import generated, random_text, show

EXAMPLES, MOST_TOKENS = 5, 64
Rule = Callable[[str], str]


def head_tail(samples: int = 300, seed: int = 0) -> Task:
    """A head and a tail, fixed within a question, around the input."""

    def rule(rng: np.random.Generator) -> Rule:
        head, tail = random_text(rng, 3, 5), random_text(rng, 3, 5)
        return lambda text: head + text + tail

    return _mining("iq_head_tail", rule, samples, seed)


def full_repeat(samples: int = 300, seed: int = 0) -> Task:
    """The input twice."""
    return _mining("iq_full_repeat", lambda rng: lambda text: text + text, samples, seed)


def head_slicing(samples: int = 300, seed: int = 0) -> Task:
    """The first characters of the input, as many in each example of a question."""

    def rule(rng: np.random.Generator) -> Rule:
        count = int(rng.integers(2, 5))
        return lambda text: text[:count]

    return _mining("iq_head_slicing", rule, samples, seed)


def _mining(
    name: str, rule: Callable[[np.random.Generator], Rule], samples: int, seed: int
) -> Task:
    def make(rng: np.random.Generator) -> tuple[str, str]:
        apply = rule(rng)
        inputs = [random_text(rng) for _ in range(EXAMPLES + 1)]
        pairs = [(text, apply(text)) for text in inputs[:-1]]
        return show(pairs, inputs[-1]), apply(inputs[-1])

    return generated(name, make, seed, samples, MOST_TOKENS, "pattern mining")
