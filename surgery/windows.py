"""Calibration and evaluation text as windows of tokens, with a record that says which they are.

All documents of a source are read as one text, joined by two line breaks. Calibration cuts
windows at random places of it, evaluation cuts it from the beginning without gaps.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data import Source, Tokenizer, open_source

JOINT = "\n\n"
POOL_CHARACTERS = 1 << 28
"""Text that is held in memory to draw windows from; what a source holds beyond is not read."""
CHARACTERS_PER_TOKEN = 8
"""More than tokenizers need on ordinary text; where it is too little, more is read."""


@dataclass(frozen=True)
class Windows:
    """`tokens int32[windows, length]`, and where they come from, as `calibration.json` holds it."""

    tokens: np.ndarray
    record: Mapping[str, Any]


def draw(
    source: Source | str, tokenizer: Tokenizer, count: int = 128, length: int = 2048, seed: int = 0
) -> Windows:
    """`count` windows of `length` tokens from random places of a source's text.

    `record["rows"]` has `[row id, character]` of each beginning. Raises `ValueError` if the text
    has fewer than `count * length` tokens.
    """
    source = open_source(source) if isinstance(source, str) else source
    ids, starts, text = _pool(source)
    _check_enough(source.spec, text, tokenizer, count, length)
    rng, limit = np.random.default_rng(seed), len(text)
    rows, windows = [], []
    while len(windows) < count:
        place = int(rng.integers(limit))
        begin = _word_start(text, place)
        tokens = _tokens_from(text, begin, tokenizer, length)
        if tokens is None:
            limit = max(place, 1)  # later places have too little text behind them
            continue
        document = bisect.bisect_right(starts, begin) - 1
        rows.append([ids[document], begin - starts[document]])
        windows.append(tokens)
    return _windows(windows, source.spec, "random places", length, seed=seed, rows=rows)


def consecutive(
    source: Source | str, tokenizer: Tokenizer, length: int = 2048, most: int | None = None
) -> Windows:
    """All whole windows of a source's text from its beginning, at most `most` of them.

    This is how published perplexities cut a test split: tokenized once, no overlap, the tail
    dropped.
    """
    source = open_source(source) if isinstance(source, str) else source
    _, _, text = _pool(source)
    if most is not None:
        text = text[: most * length * 2 * CHARACTERS_PER_TOKEN]
    tokens = tokenizer.encode([text])[0]
    found = min(len(tokens) // length, most or len(tokens))
    if not found:
        raise ValueError(
            f"{source.spec}: {len(tokens)} tokens are fewer than one window of {length}; "
            "give more text or a shorter length"
        )
    windows = list(tokens[: found * length].reshape(found, length))
    return _windows(windows, source.spec, "from the beginning", length)


def from_tokens(tokens: np.ndarray, source: str = "given tokens") -> Windows:
    """Windows of tokens at hand, `int[windows, length]`."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ValueError(
            f"calibration tokens are {tokens.dtype}{list(tokens.shape)}; they must be "
            "int[windows, length]"
        )
    return _windows(list(tokens), source, "given", tokens.shape[1])


def _windows(
    windows: list[np.ndarray], source: str, recipe: str, length: int, **more: Any
) -> Windows:
    tokens = np.stack(windows).astype(np.int32)
    record = {
        "source": source,
        "recipe": recipe,
        "length": length,
        "n_sequences": len(tokens),
        "sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        **more,
    }
    return Windows(tokens, record)


def _pool(source: Source) -> tuple[list[int], list[int], str]:
    """Row ids, where each begins in the joint text, and that text."""
    ids, starts, pieces, size = [], [], [], 0
    for row_id, text in _texts(source):
        ids.append(row_id)
        starts.append(size)
        pieces.append(text)
        size += len(text) + len(JOINT)
        if size > POOL_CHARACTERS:
            break
    if not ids:
        raise ValueError(f"{source.spec}: holds no text")
    return ids, starts, JOINT.join(pieces)


def _texts(source: Source) -> Iterator[tuple[int, str]]:
    for row in source.rows():
        if row.error is not None:
            raise row.error
        if row.text:
            yield row.row_id, row.text


def _check_enough(spec: str, text: str, tokenizer: Tokenizer, count: int, length: int) -> None:
    if count < 1 or length < 2:
        raise ValueError(f"{count} windows of {length} tokens: give 1 or more of 2 or more")
    if len(text) > count * length * CHARACTERS_PER_TOKEN:
        return
    tokens = len(tokenizer.encode([text])[0])
    if tokens < count * length:
        raise ValueError(
            f"{spec}: {tokens:,} tokens are too few for {count} windows of {length} "
            f"({count * length:,}); give more text, or at most {tokens // length} such windows"
        )


def _word_start(text: str, place: int) -> int:
    """The next character after white space, or the place itself if none is near."""
    if place == 0:
        return 0
    for near in range(place, min(place + 64, len(text) - 1)):
        if text[near].isspace():
            return near + 1
    return place


def _tokens_from(text: str, place: int, tokenizer: Tokenizer, length: int) -> np.ndarray | None:
    """The first `length` tokens of the text from `place`; None if there are not as many."""
    size = length * CHARACTERS_PER_TOKEN
    while True:
        tokens = tokenizer.encode([text[place : place + size]])[0]
        if len(tokens) > length or (len(tokens) == length and place + size >= len(text)):
            return tokens[:length]
        if place + size >= len(text):
            return None
        size *= 2
