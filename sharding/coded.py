"""Arrays made smaller for their way between devices: bfloat16, or integers with a scale a block.

Codes are symmetric, `round(x / scale)` with `scale = max|x| / 127` (int8) or `/ 7` (int4) of each
block, as in ZeRO++ (Wang et al. 2023, arXiv 2306.10209, section 3.1). Sums are never formed of
codes: whoever receives them decodes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
BITS = {"int8": 8, "int4": 4}
CODES = {8: jnp.int8, 4: jnp.int4}
SMALLEST_BLOCK = 8
"""A dimension with no larger divisor would send as many bits of scales as of codes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """Codes int8 or int4, and scales bfloat16 of the same number of dimensions, each as long as the
    codes' or a divisor of it.
    """

    codes: Any
    scales: Any


def quantize_block(x: Array, bits: int, block: int, axis: int = -1) -> Coded:
    """Codes of `x` with one scale for each `block` elements along `axis`; 0 takes one for all of
    `x`.

    An error is at most half a scale. What is not finite decodes as not finite. Raises `ValueError`
    if blocks do not divide the axis.
    """
    axis %= x.ndim
    if block and x.shape[axis] % block:
        raise ValueError(f"blocks of {block} do not divide axis {axis} of shape {x.shape}")
    wide = x.astype(jnp.float32)
    cut = wide
    if block:
        cut = wide.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    over = (axis + 1,) if block else tuple(range(x.ndim))
    largest = (1 << (bits - 1)) - 1
    scales = (jnp.max(jnp.abs(cut), axis=over, keepdims=True) / largest).astype(jnp.bfloat16)
    scales = jnp.where(scales < jnp.finfo(jnp.bfloat16).tiny, jnp.ones_like(scales), scales)
    codes = jnp.clip(jnp.round(cut / scales.astype(jnp.float32)), -largest, largest)
    scales = scales.reshape([n for i, n in enumerate(scales.shape) if not block or i != axis + 1])
    return Coded(codes.astype(CODES[bits]).reshape(x.shape), scales)


def dequantize_block(coded: Coded) -> Array:
    """What codes stand for, float32, in their shape."""
    scales = coded.scales
    for axis, (size, count) in enumerate(zip(coded.codes.shape, scales.shape, strict=True)):
        if 1 < count < size:
            scales = jnp.repeat(scales, size // count, axis=axis)
    return coded.codes.astype(jnp.float32) * scales.astype(jnp.float32)


def block_of(size: int, block: int) -> int:
    """The largest divisor of `size` that is no larger than `block`."""
    return next(n for n in range(min(size, block), 0, -1) if size % n == 0)


@dataclass(frozen=True)
class Coding:
    """How one array travels.

    precision: "float32", "bfloat16", "int8" or "int4".
    axis: of the array, along which blocks lie.
    block: elements of a block; 0 is one scale for the whole array.
    """

    precision: str = "float32"
    axis: int = -1
    block: int = 0

    def encode(self, x: Array, leading: int = 0) -> Any:
        """The arrays that travel; `leading` dimensions stand before those of the array itself."""
        if self.precision == "float32":
            return x
        if self.precision == "bfloat16":
            return x.astype(jnp.bfloat16)
        axis = self.axis % (x.ndim - leading) + leading
        coded = quantize_block(x, BITS[self.precision], self.block, axis)
        if self.block == 0:  # as many scales as there are receivers
            shape = (*x.shape[:leading], *(1,) * (x.ndim - leading))
            return Coded(coded.codes, jnp.broadcast_to(coded.scales, shape))
        return coded

    @staticmethod
    def decode(message: Any) -> Array:
        """What `encode` was given, float32 but for rounding."""
        if isinstance(message, Coded):
            return dequantize_block(message)
        return message.astype(jnp.float32)


def coding_for(
    precision: str, block: int, shape: tuple[int, ...], axis: int | None = None
) -> Coding:
    """How an array travels whose part on one device has this shape.

    Blocks lie along `axis`, or the longest one. Vectors, and arrays that no blocks of useful size
    divide, travel in float32.
    """
    if len(shape) < 2:
        return Coding()
    if precision not in BITS or block == 0:
        return Coding(precision)
    if axis is None:
        axis = max(range(len(shape)), key=lambda index: shape[index])
    found = block_of(shape[axis], block)
    return Coding(precision, axis, found) if found >= SMALLEST_BLOCK else Coding()
