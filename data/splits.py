"""Which text is trained on and which is held out: a function of the documents, not of a seed."""

from __future__ import annotations

import numpy as np

from data.packing import Spans
from data.store import TokenStore
from data.tokenizers import Tokenizer

FOLDS = 2**32
FEW = 100
"""Documents below which `auto` cuts the end of the text in place of holding out whole documents."""


def split(store: TokenStore, fraction: float, how: str) -> tuple[Spans, Spans]:
    """`(train, validation)` spans of a store; together they are every token, once.

    "hash" holds out whole documents by the hash of their text, so that equal texts go to the same
    side; "tail" holds out the last part of the tokens, cutting one document (nanoGPT's split of
    Shakespeare); "auto" is "hash" for a store of 100 documents or more, else "tail".
    """
    lengths = store.lengths
    every = Spans(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    if fraction <= 0:
        return every, every.take(np.zeros(0, np.int64))
    if how == "hash" or (how == "auto" and len(store) >= FEW):
        held = (store.hashes % FOLDS) < int(fraction * FOLDS)
        return every.take(np.flatnonzero(~held)), every.take(np.flatnonzero(held))
    cut = int(lengths.sum() * (1 - fraction))
    before = np.clip(cut - (np.cumsum(lengths) - lengths), 0, lengths)
    head = Spans(every.document, every.start, before)
    tail = Spans(every.document, before, lengths - before)
    return head.take(np.flatnonzero(before)), tail.take(np.flatnonzero(tail.length))


def bytes_and_targets(store: TokenStore, spans: Spans, tokenizer: Tokenizer) -> tuple[int, int]:
    """UTF-8 bytes of the text of spans, and how many of their tokens are predicted.

    Loss in nats per target times targets, over ln 2 times bytes, is bits per byte.
    """
    whole = spans.length == store.lengths[spans.document]
    size = int(store.text_bytes[spans.document[whole]].sum())
    for i in np.flatnonzero(~whole):
        ids = store.tokens(int(spans.document[i]), int(spans.start[i]), int(spans.length[i]))
        text = [token for token in ids.tolist() if token not in (tokenizer.bos, tokenizer.eos)]
        size += len(tokenizer.decode(text).encode())
    return size, spans.tokens - int((spans.length > 0).sum())
