"""What tasks with options share: requests for each option, and which one each score picks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.stats import proportion
from evals.task import Estimate, Loglikelihood, Row, Scored

SCORES = ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_mi")


def requests(context: str, options: Sequence[str], calibrated: bool = False) -> list[Loglikelihood]:
    """The options after the context; with `calibrated`, then the options after nothing too."""
    asked = [Loglikelihood(context, option) for option in options]
    return asked + [Loglikelihood("", option) for option in options] if calibrated else asked


def picks(options: Sequence[str], answers: Sequence[Scored]) -> dict[str, int]:
    """The option of each score, the first of equals.

    `acc`: the highest log-probability; `acc_norm`: by characters; `acc_bytes`: by bytes of UTF-8;
    `acc_tokens`: by tokens; `acc_mi`: less that of the option after nothing (if it was asked for).
    Delimiters in front of an option are not counted in characters and bytes.
    """
    plain = np.asarray([answer.logprob for answer in answers[: len(options)]])
    texts = [option.lstrip() for option in options]
    found = {
        "acc": plain,
        "acc_norm": plain / [max(len(text), 1) for text in texts],
        "acc_bytes": plain / [max(len(text.encode()), 1) for text in texts],
        "acc_tokens": plain / [answer.tokens for answer in answers[: len(options)]],
    }
    if len(answers) == 2 * len(options):
        found["acc_mi"] = plain - [answer.logprob for answer in answers[len(options) :]]
    return {name: int(np.argmax(values)) for name, values in found.items()}


def gold_index(value: Any, options: Sequence[str]) -> int:
    """The place of the right option, given as a place, a letter, or the option itself.

    Raises `ValueError` for one that is not among the options.
    """
    if isinstance(value, str):
        if value in options:
            return list(options).index(value)
        if len(value) == 1 and "A" <= value.upper() <= "Z":
            value = ord(value.upper()) - 65
        elif value.isdigit():
            value = int(value)
    if not isinstance(value, int) or not 0 <= value < len(options):
        raise ValueError(f"the right answer {value!r} is none of the {len(options)} options")
    return value


def accuracies(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of right picks by each score that the rows have."""
    names = [name for name in SCORES if name in rows[0]["picks"]]
    return {
        name: proportion([float(row["picks"][name] == row["gold"]) for row in rows])
        for name in names
    }
