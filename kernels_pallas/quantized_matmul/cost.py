"""FLOPs and bytes of a quantized product, for a roofline."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def cost(
    m: int,
    rows: int,
    columns: int,
    *,
    bits: int,
    group: int,
    dtype: Any = jnp.bfloat16,
    out: Any = jnp.bfloat16,
    scale_bytes: int = 4,
    zeros: bool = False,
) -> tuple[int, int]:
    """`(flops, bytes)` of `[m, rows] x [rows, columns]`, each array once: codes at `bits` bits,
    scales and zeros at `scale_bytes`, input and output in their types.
    """
    weights = rows * columns * bits // 8
    scales = rows // group * columns * scale_bytes * (2 if zeros else 1)
    moved = m * rows * jnp.dtype(dtype).itemsize + m * columns * jnp.dtype(out).itemsize
    return 2 * m * rows * columns, weights + scales + moved
