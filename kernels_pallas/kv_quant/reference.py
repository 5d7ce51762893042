"""Decode attention to quantized pages in plain `jax.numpy`: the definition that every kernel must
match, and what runs on a CPU. The pages of the table are read back and attended to.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.reference import attend, see
from kernels_pallas.decode_attention.softmax import Softmax, check_softmax
from kernels_pallas.kv_quant.pages import QuantizedPages

Array = jax.Array


def quantized_attention(
    q: Array,
    pages: QuantizedPages,
    page_table: Array,
    lengths: Array,
    *,
    positions: Array | None = None,
    layer: Any = 0,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
) -> Any:
    """Attention of a few queries of each sequence to its quantized pages.

    Args:
        q: `[batch, queries, heads, head_dim]`; `heads` must be a multiple of `kv_heads`.
        pages: `Int8Pages` or `KiviPages`.
        page_table: `int32[batch, width]`, page numbers; unused entries are any valid ones.
        lengths: `int32[batch]`, tokens of each sequence that the pages hold, from position 0 on.
            What lies beyond is never read, NaN included.
        positions: `int32[batch]`, position of the first query of each sequence; the others follow.
            None: the queries are the last of the `lengths`. Further on, they see all of the pages.
        layer: the layer of `pages`, an int or `int32[]`.
        soft_cap, alibi_slopes, scale, softmax: see `decode_attention`.
        return_lse: also return the log-sum-exp of the scores, which `merge` needs to add the tokens
            that are not quantized yet.

    Returns:
        `[batch, queries, heads, head_dim]` in `q.dtype`, and with `return_lse` also
        `float32[batch, queries, heads]`. A query that may see nothing gives 0 and `-inf`.
    """
    check(q, pages, page_table, lengths, softmax)
    k, v = (_joined(x) for x in pages.read(layer, page_table))
    slot = jnp.arange(k.shape[2], dtype=jnp.int32)
    used = slot < lengths[:, None]
    first = lengths - q.shape[1] if positions is None else positions
    distance = (first[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32))[:, :, None] - slot
    out, lse = attend(
        q,
        k.astype(q.dtype),
        jnp.where(used[:, None, :, None], v, 0).astype(q.dtype),
        distance,
        see(distance, slot, None, 0) & used[:, None, :],
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        scale=scale,
        softmax=softmax,
    )
    return (out, lse) if return_lse else out


def _joined(x: Array) -> Array:
    """`[batch, width, kv_heads, page_size, dim]` -> `[batch, kv_heads, tokens, dim]`."""
    batch, width, kv_heads, size, dim = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, kv_heads, width * size, dim)


def check(
    q: Array, pages: QuantizedPages, page_table: Array, lengths: Array, softmax: Softmax
) -> None:
    """Raises `ValueError` that names the argument and what would be right."""
    kv_heads, dim = pages.keys.shape[2], pages.keys.shape[-1]
    if q.ndim != 4 or q.shape[-1] != dim or q.shape[2] % kv_heads:
        raise ValueError(
            f"quantized_attention takes q [batch, queries, heads, dim]; got q {q.shape} with pages "
            f"of {kv_heads} kv heads of {dim}"
        )
    if page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"q {q.shape}, page_table {page_table.shape} and lengths {lengths.shape} disagree in "
            "the batch"
        )
    check_softmax(softmax, q.shape[2])
