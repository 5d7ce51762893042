"""A step of mixed prompts and decoding sequences, as the kernels take it: in two passes.

Sequences of one token go through tiles of one token each, so that a sequence's keys meet only its
own few rows. Sequences of more go through tiles of many tokens of the flat order, which neighbours
may share; a row sees only the keys of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.stream import Items, Masking
from kernels_pallas.decode_attention.work import one_token_items, tile_items

Array = jax.Array
Run = Callable[[Array, Items, Array, Masking], tuple[Array, Array]]
"""`(q [tiles, tokens, heads, dim], items, how many are real, masking) -> (out like q, lse [tiles,
tokens, heads])`, undefined for tiles without an item."""


def ragged_attention(
    run: Run,
    keys: int,
    masking_of: Callable[[int], Masking],
    q: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    tile: int | None,
) -> tuple[Array, Array]:
    """Both passes.

    Args:
        run: a kernel with its arrays.
        keys: of its blocks.
        masking_of: from the tokens of a tile.
        q: `[tokens, heads, head_dim]`.
        kv_lens, cu_q_lens: as `paged_attention` takes them.
        tile: tokens of a tile of the second pass; None if every sequence has one token.

    Returns `[tokens, heads, head_dim]` and `float32[tokens, heads]`.
    """
    starts, ends = cu_q_lens[:-1], cu_q_lens[1:]
    out = jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    single = ends - starts == 1
    rank = jnp.argsort(~single, stable=True)
    rows = jnp.where(single, starts, len(q))[rank]
    masking = masking_of(1)
    taken = jnp.take(q, rows, axis=0, mode="clip")[:, None]
    items = one_token_items(rank, kv_lens, keys, masking)
    part = run(taken, items, jnp.sum(single, dtype=jnp.int32), masking)
    out = jax.tree.map(lambda x, new: x.at[rows].set(new[:, 0], mode="drop"), out, part)
    if tile is None:
        return out
    return _second_pass(run, keys, masking_of(tile), q, kv_lens, starts, ends, out)


def _second_pass(
    run: Run,
    keys: int,
    masking: Masking,
    q: Array,
    kv_lens: Array,
    starts: Array,
    ends: Array,
    out: Any,
) -> tuple[Array, Array]:
    several, tokens = ends - starts > 1, masking.tokens
    tiles = -(-len(q) // tokens)
    items, count = tile_items(starts, ends, kv_lens, several, tiles, keys, masking)
    padded = jnp.pad(q, ((0, tiles * tokens - len(q)), (0, 0), (0, 0)))
    part = run(padded.reshape(tiles, tokens, *q.shape[1:]), items, count, masking)
    token = jnp.arange(len(q), dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(ends, token, side="right"), len(ends) - 1)
    chosen = several[owner] & (token < ends[-1])

    def choose(x: Array, new: Array) -> Array:
        new = new.reshape(-1, *new.shape[2:])[: len(q)]
        return jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), new, x)

    return jax.tree.map(choose, out, part)
