"""What paged attention costs: decoding reads the pages once, prompts multiply.

A decoding sequence reads `2 * dim * bytes` a cached token and kv head for `4 * dim * group`
operations, so memory bounds it. A prompt of T tokens takes `2 * T^2 * heads * dim` operations (half
of the square is hidden), and its intensity grows with the tokens that are computed at a time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def paged_attention(
    q: Any, pages: Any, *, cached_tokens: int, pairs: int | None = None
) -> tuple[float, float]:
    """`(flops, bytes)` of one call.

    Args:
        q: `[tokens, heads, head_dim]`, or anything with its shape and dtype.
        pages: `[..., page_size, 2 * kv_heads, head_dim]`.
        cached_tokens: read from pages, summed over the sequences: with a window, those within.
        pairs: of a query and a key that it sees; None is `cached_tokens`, each query's own.
    """
    tokens, heads, dim = q.shape
    pairs = cached_tokens if pairs is None else pairs
    read = cached_tokens * pages.shape[-2] * dim * jnp.dtype(pages.dtype).itemsize
    ends = 2 * tokens * heads * dim * jnp.dtype(q.dtype).itemsize
    return 4.0 * pairs * heads * dim, float(read + ends)


def append(k: Any, pages: Any) -> tuple[float, float]:
    """`(flops, bytes)` of storing k and v `[tokens, kv_heads, head_dim]`: read, and written."""
    tokens, kv_heads, dim = k.shape
    each = jnp.dtype(k.dtype).itemsize + jnp.dtype(pages.dtype).itemsize
    return 0.0, float(2 * tokens * kv_heads * dim * each)
