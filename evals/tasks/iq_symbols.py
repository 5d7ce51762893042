"""IQ suite, symbolic mapping: a classification whose labels are random symbols, so that nothing a
model knows of the labels helps. `symbol_map` wraps any labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from evals.task import Example, Task
from evals.tasks.classification import (
    LICENCE,
    POLARITY_LABELS,
    POLARITY_PLACE,
    TREC_LABELS,
    TREC_PLACE,
    Labels,
    classify,
    polarity_rows,
    trec_rows,
)
from evals.taxonomy import Place

Mode = Literal["mapped", "unexplained", "original"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
OTHERS = "0123456789%@#?+"
LENGTH = 9


def symbol_map(labels: Labels, texts: Sequence[str], seed: int, explained: bool = True) -> Labels:
    """Labels with a symbol in place of each word: `<`, characters of two kinds in turn, `>`; all of
    one length, and in none of the texts. explained: the instruction says what each stands for.
    """
    rng, symbols = np.random.default_rng(seed), {}
    for name in labels.words:
        symbol = _symbol(rng)
        while symbol in symbols.values() or any(symbol in text for text in texts):
            symbol = _symbol(rng)
        symbols[name] = symbol
    meanings = ", ".join(f"{symbols[name]} is {word}" for name, word in labels.words.items())
    instruction = "Give each text its symbol."
    if explained:
        instruction = f"{labels.instruction} Answer with symbols: {meanings}."
    return dataclasses.replace(labels, words=symbols, instruction=instruction)


def _symbol(rng: np.random.Generator) -> str:
    kinds = (LETTERS, OTHERS)
    inner = (kinds[i % 2][rng.integers(len(kinds[i % 2]))] for i in range(LENGTH))
    return f"<{''.join(inner)}>"


def symbol_trec(path: str, mode: Mode = "mapped", shots: int = 6, seed: int = 0) -> Task:
    """TREC's question types as symbols. mode: `unexplained` leaves out what the symbols stand for,
    `original` keeps the words.
    """
    asked, shown = (functools.partial(trec_rows, path, split) for split in ("test", "train"))
    return _mapped("iq_symbol_trec", TREC_LABELS, asked, shown, mode, shots, seed, TREC_PLACE)


def symbol_polarity(path: str, mode: Mode = "mapped", shots: int = 6, seed: int = 0) -> Task:
    """The sentence polarity of film reviews as symbols; modes as of `symbol_trec`."""
    asked, shown = (functools.partial(polarity_rows, path, shown) for shown in (False, True))
    return _mapped(
        "iq_symbol_polarity", POLARITY_LABELS, asked, shown, mode, shots, seed, POLARITY_PLACE
    )


def _mapped(
    name: str,
    labels: Labels,
    asked: Callable[[], Sequence[Example]],
    shown: Callable[[], Sequence[Example]],
    mode: Mode,
    shots: int,
    seed: int,
    place: Place,
) -> Task:
    @functools.cache
    def mapped() -> Labels:
        if mode == "original":
            return labels
        texts = [str(row["text"]) for row in (*asked(), *shown())]
        return symbol_map(labels, texts, seed, mode == "mapped")

    place = dataclasses.replace(place, category="reasoning", subcategory="symbolic mapping")
    # A symbol may take more tokens than another, which a sum would hold against it.
    return classify(name, mapped, asked, shown, shots, place, LICENCE, score="acc_tokens")
