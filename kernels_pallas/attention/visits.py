"""Which blocks of the score matrix a kernel visits, decided from positions and segments as data.

Scores are cut into blocks of queries times blocks of keys. From the smallest and largest position
and segment of each block follows whether a pair of blocks holds nothing that may be seen (it is not
visited: neither loaded nor computed), something (it is masked), or nothing hidden (it needs no
mask). Causal order, windows, sinks and packed documents all come out of the same comparison, for
any order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.attention.scores import Rules

Array = jax.Array

HIDDEN, PARTIAL, FULL = 0, 1, 2
"""Kinds of a pair of blocks."""

_FIRST, _LAST, _MINOR, _MAJOR = 2, 3, 4, 17
COARSE = 128
"""Tokens of a block where only whether anything is seen matters."""
MOST_BLOCKS = 1 << (_MAJOR - _MINOR)
"""Blocks along one axis that a code can tell apart."""


@dataclass(frozen=True)
class _Ranges:
    """Of each block `[batch, blocks]`: the range of positions and segments over tokens that are not
    padding; whether there is such a token; whether all are of one document.
    """

    low: Array
    high: Array
    first: Array
    last: Array
    any: Array
    uniform: Array


def block_kinds(rules: Rules, queries: Array, keys: Array, block_q: int, block_k: int) -> Array:
    """`int32[batch, query blocks, key blocks]` of HIDDEN, PARTIAL and FULL; PARTIAL if in doubt.

    queries, keys: `int32[batch, 2, length]`, positions and segments; the lengths are multiples of
    their blocks, and segment 0 or less is padding.
    """
    q = jax.tree.map(lambda x: x[:, :, None], _ranges(queries, block_q))
    k = jax.tree.map(lambda x: x[:, None, :], _ranges(keys, block_k))
    some = q.any & k.any & (q.first <= k.last) & (k.first <= q.last)
    every = q.uniform & k.uniform & (q.first == k.first)
    if rules.causal:
        some &= q.high >= k.low
        every &= q.low >= k.high
    if rules.window is not None:
        near, within = q.low - k.high < rules.window, q.high - k.low < rules.window
        if not rules.causal:
            near &= k.low - q.high < rules.window
            within &= k.high - q.low < rules.window
        some &= near | (k.low < rules.sinks)
        every &= within | (k.high < rules.sinks)
    return jnp.where(some & every, FULL, jnp.where(some, PARTIAL, HIDDEN)).astype(jnp.int32)


def visits(kinds: Array) -> tuple[Array, Array]:
    """The pairs to visit, row after row of `kinds`, every row at least once.

    Args:
        kinds: `int32[batch, rows, columns]`; a kernel holds the row's result while it runs over
            the columns.

    Returns `int32[batch, rows * columns]` of codes for `decode`, and `int32[]`, how many of them
    the longest list has; shorter lists repeat their last pair as one to skip.
    """
    batch, rows, columns = kinds.shape
    if max(rows, columns) > MOST_BLOCKS:
        raise ValueError(
            f"{rows} x {columns} blocks of scores; at most {MOST_BLOCKS} along each axis"
        )
    row = jnp.arange(rows, dtype=jnp.int32)[:, None] << _MAJOR
    column = jnp.arange(columns, dtype=jnp.int32)[None, :] << _MINOR
    blind = jnp.all(kinds == HIDDEN, axis=2, keepdims=True) & (column == 0)
    visited = (kinds > HIDDEN) | blind
    listed = jnp.where(visited, row | column | kinds, jnp.iinfo(jnp.int32).max)
    codes = jnp.sort(listed.reshape(batch, -1), axis=1)
    counts = jnp.sum(visited, axis=(1, 2), dtype=jnp.int32)[:, None]
    major = codes >> _MAJOR
    edge = jnp.full((batch, 1), -1, jnp.int32)
    first = major != jnp.concatenate([edge, major[:, :-1]], axis=1)
    last = major != jnp.concatenate([major[:, 1:], edge], axis=1)
    beyond = jnp.arange(rows * columns, dtype=jnp.int32)[None, :] >= counts
    idle = jnp.max(jnp.where(beyond, 0, codes), axis=1, keepdims=True) >> _MINOR << _MINOR
    codes |= (first << _FIRST) | (last << _LAST)
    return jnp.where(beyond, idle, codes), jnp.max(counts)


def by_row(kinds: Array) -> tuple[Array, Array]:
    """For each row the columns to visit: first those that need no mask, then those that do.

    Args:
        kinds: `int32[batch, rows, columns]`.

    Returns `int32[batch, rows, columns]`, meaningless beyond the counts, and
    `int32[batch, rows, 2]`: how many need no mask, and how many are visited.
    """
    column = jnp.arange(kinds.shape[2], dtype=jnp.int32)
    masked, beyond = 1 << _MAJOR, 2 << _MAJOR
    order = jnp.where(kinds == FULL, 0, jnp.where(kinds == PARTIAL, masked, beyond)) | column
    whole, visited = kinds == FULL, kinds > HIDDEN
    counts = jnp.stack([jnp.sum(x, axis=2, dtype=jnp.int32) for x in (whole, visited)], axis=2)
    return jnp.sort(order, axis=2) & (masked - 1), counts


def sees_anything(
    query_positions: Array,
    key_positions: Array,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
) -> Array:
    """`bool[]`, False only if no query may see any key; takes what `reference.mask` takes, and no
    array of queries times keys.
    """
    rules = Rules(causal, window, sinks, None, 1.0, False, True)
    queries, block_q = _in_blocks(query_positions, query_segment_ids)
    keys, block_k = _in_blocks(key_positions, key_segment_ids)
    return jnp.any(block_kinds(rules, queries, keys, block_q, block_k) > HIDDEN)


def _in_blocks(positions: Array, segments: Array | None) -> tuple[Array, int]:
    segments = jnp.ones_like(positions) if segments is None else segments
    tokens = jnp.stack([positions, segments], axis=1).astype(jnp.int32)
    block = min(COARSE, tokens.shape[2])
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, -tokens.shape[2] % block))), block


def decode(code: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Row, column, kind, and whether this is the first and the last visit of the row."""
    first, last = (code >> _FIRST) & 1, (code >> _LAST) & 1
    return code >> _MAJOR, (code >> _MINOR) & (MOST_BLOCKS - 1), code & 3, first == 1, last == 1


def _ranges(tokens: Array, block: int) -> _Ranges:
    positions, segments = tokens.reshape(tokens.shape[0], 2, -1, block).swapaxes(0, 1)
    valid = segments > 0

    def over(x: Array) -> tuple[Array, Array]:
        low = jnp.min(jnp.where(valid, x, jnp.iinfo(jnp.int32).max), axis=-1)
        high = jnp.max(jnp.where(valid, x, jnp.iinfo(jnp.int32).min), axis=-1)
        some = low <= high  # differences of the others would overflow
        return jnp.where(some, low, 0), jnp.where(some, high, 0)

    (low, high), (first, last) = over(positions), over(segments)
    uniform = jnp.all(valid, axis=-1) & (first == last)
    return _Ranges(low, high, first, last, jnp.any(valid, axis=-1), uniform)


jax.tree_util.register_dataclass(_Ranges)
