"""The exact integer product for a CPU.

XLA multiplies 8-bit integers well where there are many rows; for few it would write both matrices
out as 32 bits first. There, 128 rows of codes at a time become float32, whose products and sums are
exact up to 2**24, and for one row of input the codes are multiplied and added in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.int8_matmul import reference
from kernels_pallas.tuning import Key, best

Array = jax.Array

MANY = 64
"""Rows of input from which XLA's own product is faster, where nothing was measured."""
STEPS = {"whole": 0, "blocks": 128, "vector": 16}
"""Route -> rows of codes of a step: XLA's own product has no steps, and one row of input multiplies
in one pass.
"""
EXACT_ROWS = 1024
"""Rows whose products float32 sums exactly: `128**2 * EXACT_ROWS <= 2**24`."""


def tuning_key(m: int, rows: int, columns: int, device_kind: str = "cpu") -> Key:
    """What the route of a product is looked up by."""
    sizes = {"m": m, "rows": rows, "columns": columns}
    return Key.of("int8_matmul.blocks", sizes, "int8", device_kind)


def default_sizes(m: int) -> dict[str, int | str]:
    """The route for `m` rows of input where nothing was measured, and its rows of codes."""
    route = "vector" if m == 1 else "blocks" if m < MANY else "whole"
    return {"route": route, "rows": STEPS[route]}


def fits(sizes: Mapping[str, Any], m: int, rows: int) -> bool:
    """Whether a product of `m` rows of input with `rows` rows of codes can go that way, exactly."""
    if sizes["route"] == "whole":
        return True
    known = sizes["route"] in STEPS and (m == 1 or sizes["route"] != "vector")
    return known and 0 < sizes["rows"] <= min(rows, EXACT_ROWS)


def product(x: Array, w: Array) -> Array:
    """`int8[M, K] x int8[K, N] -> int32[M, N]`, exact; see `reference.product`."""
    m, (rows, columns) = x.shape[0], w.shape
    default = default_sizes(m)
    if 0 in (m, rows, columns) or not fits(default, m, rows):
        return reference.product(x, w)
    key = tuning_key(m, rows, columns)
    sizes = best(key, default, fits=lambda sizes: fits(sizes, m, rows))
    if sizes["route"] == "whole":
        return reference.product(x, w)
    step, multiply = sizes["rows"], _vector if sizes["route"] == "vector" else _block
    count, left = divmod(rows, step)
    total = _steps(x, w, count, step, multiply)
    if left == 0:
        return total
    return total + reference.product(x[:, count * step :], w[count * step :])


def _steps(x: Array, w: Array, count: int, step: int, multiply: Callable[..., Array]) -> Array:
    def add(i: Array, total: Array) -> Array:
        ours = jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1)
        return total + multiply(ours, jax.lax.dynamic_slice_in_dim(w, i * step, step))

    zeros = jnp.zeros((x.shape[0], w.shape[1]), jnp.int32)
    axes = tuple(jax.typeof(w).manual_axis_type.varying | jax.typeof(x).manual_axis_type.varying)
    zeros = jax.lax.pcast(zeros, axes, to="varying") if axes else zeros
    return jax.lax.fori_loop(0, count, add, zeros)


def _block(x: Array, w: Array) -> Array:
    exact = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    return exact.astype(jnp.int32)


def _vector(x: Array, w: Array) -> Array:
    total = jnp.zeros(w.shape[1], jnp.int32)
    for k in range(w.shape[0]):
        total = total + x[0, k].astype(jnp.int32) * w[k].astype(jnp.int32)
    return total[None]
