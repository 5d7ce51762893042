"""What decode attention costs: it reads the cache once, so memory bounds it.

For each kv head and cached token, `2 * dim * bytes` to read and `4 * dim * group` operations for
each query: with bfloat16 an intensity of `group` operations a byte and query, far below what any
chip could multiply meanwhile.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl


def decode_attention(q: Any, k: Any, v: Any, *, tokens: int) -> tuple[float, float]:
    """`(flops, bytes)` of one call.

    Args:
        q: `[batch, queries, heads, head_dim]`, or anything with its shape and dtype.
        k: `[batch, kv_heads, slots, head_dim]`.
        v: `[batch, kv_heads, slots, value_dim]`.
        tokens: cached tokens that are read, summed over the batch: with a window, those within.
    """
    batch, queries, heads, head_dim = q.shape
    dims = head_dim + v.shape[-1]
    cache = tokens * k.shape[1] * dims * jnp.dtype(k.dtype).itemsize
    ends = batch * queries * heads * dims * jnp.dtype(q.dtype).itemsize
    return 2.0 * tokens * queries * heads * dims, float(cache + ends)


def estimate(flops: float, bytes_accessed: float, exponentials: float = 0) -> pl.CostEstimate:
    """The same as the compiler takes it."""
    return pl.CostEstimate(
        flops=int(flops), bytes_accessed=int(bytes_accessed), transcendentals=int(exponentials)
    )
