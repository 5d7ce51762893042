"""From texts to what is scored: tokens, the last few of which are the ones that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.tokenizers import Tokenizer
from evals.task import RequestError


@dataclass(frozen=True)
class Span:
    """`tokens int32[n]`, of which the last `count` are predicted, each from those before it.

    cut: tokens that were left out in front, for want of room.
    """

    tokens: np.ndarray
    count: int
    cut: int = 0


def prefix_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it: BOS, else EOS."""
    found = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    if found is None:
        raise ValueError(
            "the tokenizer has neither a BOS nor an EOS token, so a text's first token has no "
            "context; give one in the tokenizer's files"
        )
    return found


def pair_spans(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], max_length: int
) -> list[Span]:
    """The spans of (context, continuation).

    Trailing white space of a context goes to the continuation. The whole is encoded once and the
    context once, and what the whole has beyond the context is scored: encoded apart, the two would
    have other ids. Contexts lose their beginning where they do not fit. Raises `RequestError` for a
    continuation that has no token, or more than `max_length`.
    """
    moved = [_move_space(*pair) for pair in pairs]
    wholes = tokenizer.encode([context + continuation for context, continuation in moved])
    heads = tokenizer.encode([context for context, _ in moved])
    spans = []
    for place, (whole, head, pair) in enumerate(zip(wholes, heads, moved, strict=True)):
        try:
            spans.append(_pair_span(tokenizer, whole, head, pair, max_length))
        except ValueError as error:
            raise RequestError(place, error) from None
    return spans


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _pair_span(
    tokenizer: Tokenizer,
    whole: np.ndarray,
    head: np.ndarray,
    pair: tuple[str, str],
    max_length: int,
) -> Span:
    count = len(whole) - (len(head) if pair[0] else 0)
    if count < 1:  # The continuation has merged with the context's last tokens.
        count = len(whole) - _common(whole, head)
    if count < 1:
        raise ValueError(f"continuation {pair[1]!r} adds no token to its context")
    front: Sequence[int] = tokenizer.prompt_prefix
    if not front and count == len(whole):
        prefix = prefix_token(tokenizer)
        if whole[0] == prefix and count > 1:
            count -= 1
        else:
            front = (prefix,)
    if count > max_length:
        raise ValueError(
            f"continuation {pair[1][:40]!r}… has {count} tokens, more than the {max_length} that "
            "the model reads at once; shorten it or use a model with a longer context"
        )
    tokens = np.concatenate([np.asarray(front, np.int32), whole]).astype(np.int32)
    cut = max(0, len(tokens) - max_length - 1)
    return Span(tokens[cut:], count, cut)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def rolling_spans(
    prefix: int, tokens: np.ndarray, window: int, stride: int | None = None
) -> list[Span]:
    """The windows over a document: each token is predicted once, with at most `window` before it.

    The first predicts `min(window, n)` tokens, each later one `min(stride, left)` more, and reads
    the `window` tokens before the last of them. stride: None is `window`: the fewest windows, in
    which a first token sees one token; a smaller one gives every token more to see.
    """
    stride = window if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"window {window} with stride {stride}: needs 1 <= stride <= window")
    whole = np.concatenate([[prefix], tokens]).astype(np.int32)
    spans, done = [], 0
    while done < len(tokens):
        stop = min(done + (stride if done else window), len(tokens))
        spans.append(Span(whole[max(0, stop - window) : stop + 1], stop - done))
        done = stop
    return spans
