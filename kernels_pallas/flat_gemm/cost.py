"""FLOPs and bytes of a dense product, for a roofline."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def cost(m: int, k: int, n: int, *, dtype: Any = jnp.bfloat16) -> tuple[int, int]:
    """`(flops, bytes)` of `[m, k] x [k, n]`, each array once, all in `dtype`."""
    return 2 * m * k * n, jnp.dtype(dtype).itemsize * (m * k + k * n + m * n)
