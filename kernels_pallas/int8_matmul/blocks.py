"""The exact integer product for a CPU.

XLA multiplies 8-bit integers well where there are many rows; for few it would write both matrices
out as 32 bits first. There, 128 rows of codes at a time become float32, whose products and sums are
exact up to 2**24, and for one row of input the codes are multiplied and added in one pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.int8_matmul import reference

Array = jax.Array

MANY = 64
"""Rows of input from which XLA's own product is faster."""
STEP = 128
"""Rows of codes that become float32 at a time; 128**2 * STEP <= 2**24."""
VECTOR = 16
"""Rows of codes that one row of input multiplies in one pass."""


def product(x: Array, w: Array) -> Array:
    """`int8[M, K] x int8[K, N] -> int32[M, N]`, exact; see `reference.product`."""
    rows, step = x.shape[0], VECTOR if x.shape[0] == 1 else STEP
    if rows == 0 or rows >= MANY or w.shape[0] < step:
        return reference.product(x, w)
    count, left = divmod(w.shape[0], step)
    total = _steps(x, w, count, step)
    if left == 0:
        return total
    return total + reference.product(x[:, count * step :], w[count * step :])


def _steps(x: Array, w: Array, count: int, step: int) -> Array:
    multiply = _vector if x.shape[0] == 1 else _block

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
