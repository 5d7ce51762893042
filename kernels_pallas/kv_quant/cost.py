"""What attention to quantized pages costs: it reads few bytes, so few bytes are all that counts.

bytes of one token and kv head, keys and values with their scales:

    int8                 2 * dim + 8
    b bits, groups of g  2 * dim * (b + 2 * 16 / g) / 8      2 bits in groups of 32: 3.0 bits
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def quantized_attention(q: Any, pages: Any, *, cached_tokens: int) -> tuple[float, float]:
    """`(flops, bytes)` of one call; dequantizing is not counted.

    Args:
        q: `[batch, queries, heads, head_dim]`, or anything with its shape and dtype.
        pages: `Int8Pages` or `KiviPages`, arrays or their shapes and dtypes.
        cached_tokens: read from pages, summed over the batch.
    """
    batch, queries, heads, dim = q.shape
    ends = 2 * batch * queries * heads * dim * jnp.dtype(q.dtype).itemsize
    flops = 4.0 * cached_tokens * queries * heads * dim
    return flops, float(cached_tokens * token_bytes(pages) + ends)


def token_bytes(pages: Any) -> float:
    """Bytes of one token in one layer, all kv heads, keys and values."""
    leaves = jax.tree.leaves(pages)
    layers, count = leaves[0].shape[:2]
    total = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    return total / (layers * count * pages.page_size)
