"""Operations and bytes of the 8-bit product and of its row quantizer, for a roofline."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def cost(m: int, rows: int, columns: int, out: Any = jnp.bfloat16) -> tuple[int, int]:
    """`(operations, bytes)` of `int8[m, rows] x int8[rows, columns]`, each array once."""
    moved = m * rows + rows * columns + 4 * (m + columns)
    return 2 * m * rows * columns, moved + m * columns * jnp.dtype(out).itemsize


def quantizer_cost(m: int, rows: int, dtype: Any) -> tuple[int, int]:
    """`(operations, bytes)` of `quantize_rows` of `[m, rows]`: the input is read once."""
    return 6 * m * rows, m * rows * (jnp.dtype(dtype).itemsize + 1) + 4 * m
