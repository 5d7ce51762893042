"""Decode attention to quantized pages by the best implementation for the device; every one computes
what `reference.quantized_attention` defines.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import door
from kernels_pallas.attention.reference import merge
from kernels_pallas.decode_attention.api import decode_attention, split
from kernels_pallas.decode_attention.softmax import Softmax
from kernels_pallas.kv_quant import gpu, reference, tpu
from kernels_pallas.kv_quant.pages import KiviPages, QuantizedPages

Array = jax.Array

OPERATION = door.Operation(
    "quantized_attention",
    reference.quantized_attention,
    {"tpu": tpu.quantized_attention, "gpu": gpu.quantized_attention},
    {"tpu": tpu.obstacle, "gpu": gpu.obstacle},
)
IMPLEMENTATIONS = ("plain", *OPERATION.kernels)


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
    implementation: str | None = None,
) -> Any:
    """See `reference.quantized_attention`. implementation: a name in `IMPLEMENTATIONS`; None takes
    the kernel of the platform where it serves, else the plain function with one warning.
    """
    reference.check(q, pages, page_table, lengths, softmax)
    arguments = {"q": q, "pages": pages, "page_table": page_table, "lengths": lengths}
    arguments |= {"positions": positions, "alibi_slopes": alibi_slopes}
    options = {"soft_cap": soft_cap, "scale": scale, "return_lse": return_lse}
    return door.call(OPERATION, implementation, *split(arguments, options, layer, softmax))


def kivi_attention(
    q: Array,
    pages: KiviPages,
    page_table: Array,
    lengths: Array,
    residual_keys: Array,
    residual_values: Array,
    residual_lengths: Array,
    *,
    layer: Any = 0,
    alibi_slopes: Array | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Attention to quantized pages and to the newest tokens, which are not quantized yet (KIVI,
    section 3.2).

    Args:
        q: `[batch, queries, heads, head_dim]`, the last of the residual's tokens.
        pages, page_table, lengths, layer: of `quantized_attention`.
        residual_keys, residual_values: `[layers, batch, kv_heads, slots, head_dim]`.
        residual_lengths: `int32[batch]`, tokens of each sequence there.
        alibi_slopes: `[heads]`.
        return_lse: also return the log-sum-exp of the scores.
        options: soft_cap, scale, softmax and implementation, of both parts.

    Returns:
        As `quantized_attention`.
    """
    options |= {"alibi_slopes": alibi_slopes, "layer": layer, "return_lse": True}
    positions = lengths + residual_lengths - jnp.int32(q.shape[1])
    quantized = quantized_attention(q, pages, page_table, lengths, positions=positions, **options)
    newest = decode_attention(q, residual_keys, residual_values, residual_lengths, **options)
    out, lse = merge(*zip(quantized, newest, strict=True))
    return (out, lse) if return_lse else out
