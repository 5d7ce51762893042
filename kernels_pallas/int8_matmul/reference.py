"""The product of 8-bit integers in plain `jax.numpy`: the definition that every implementation must
match.

    q_ik = round(127 x_ik / r_i),  scale_i = r_i / 127,  r_i = max_k |x_ik|
    y_in = scale_i * scale_n * sum_k q_ik w_kn

The sum is an exact integer. LLM.int8() (arXiv 2208.07339) takes channels in which any value reaches
a threshold out of the codes, and such values out of the maximum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

MOST_ROWS = 2**17
"""Rows of a product whose sum surely fits 32 bits: `127**2 * rows < 2**31`."""


def quantize_rows(x: Array, threshold: float | None) -> tuple[Array, Array, Array]:
    """`[M, K] -> int8[M, K], float32[M], bool[K]`: codes, scales, and the channels left out.

    A row of zeros has scale 0; a row that is not finite has such a scale, and zeros in the place of
    its codes that are no numbers.
    """
    codes, scales, peaks = unmasked_rows(x, threshold)
    outlier = jnp.zeros(x.shape[1], bool) if threshold is None else peaks >= threshold
    return jnp.where(outlier, jnp.int8(0), codes), scales, outlier


def unmasked_rows(x: Array, threshold: float | None) -> tuple[Array, Array, Array]:
    """Codes of all channels, scales, and the largest absolute value of each channel,
    `float32[K]`.
    """
    x = x.astype(jnp.float32)
    size = jnp.abs(x)
    counted = size if threshold is None else jnp.where(size >= threshold, 0.0, size)
    most = jnp.max(counted, axis=1, initial=0.0)
    codes = codes_of(x, most[:, None])
    return codes, most / 127, jnp.max(size, axis=0, initial=0.0)


def codes_of(x: Array, most: Array) -> Array:
    """`round(127 x / most)` in -127 .. 127, half to even; 0 for what is no number."""
    scaled = x * jnp.where(most > 0, 127 / most, 0.0)
    rounded = jnp.clip(jnp.round(scaled), -127, 127)
    return jnp.where(jnp.isnan(rounded), 0.0, rounded).astype(jnp.int8)


def product(x: Array, w: Array) -> Array:
    """`int8[M, K] x int8[K, N] -> int32[M, N]`, exact."""
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def scaled(
    total: Array,
    x_scales: Array,
    scales: Array,
    dtype: Any,
    bias: Array | None = None,
    addend: Array | None = None,
) -> Array:
    """`int32[M, N]` sums to values: `total * x_scales[:, None] * scales + bias + addend`."""
    y = total.astype(jnp.float32) * x_scales[:, None] * scales.astype(jnp.float32)
    return added(y, bias, addend).astype(dtype)


def added(y: Array, bias: Array | None, addend: Array | None) -> Array:
    """`float32[M, N]` with the terms that there are."""
    for term in (bias, addend):
        y = y if term is None else y + term.astype(jnp.float32)
    return y
