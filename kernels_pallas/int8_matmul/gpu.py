"""The product of 8-bit integers on a Hopper GPU, with its scales; see `gpu_product.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.int8_matmul.gpu_operand import COLUMNS, DEPTH, operand, turned
from kernels_pallas.int8_matmul.gpu_product import WIDTH, product

Array = jax.Array

SWIZZLE = (plgpu.SwizzleTransform(WIDTH),)


def unsupported(x: Array, w: Array, dtype: Any) -> str | None:
    """Why the kernel does not take these arguments; None if it does."""
    if x.size == 0 or w.size == 0:
        return "the product is empty"
    if w.shape[1] % 16:
        return f"the GPU kernel takes columns in sixteens; there are {w.shape[1]}"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the result is {dtype}; the GPU kernel makes bfloat16, float16 or float32"
    return None


def int8_matmul(
    x: Array,
    w: Array,
    x_scales: Array,
    scales: Array,
    bias: Array | None = None,
    addend: Array | None = None,
    *,
    dtype: Any,
    device: str = "h100",
    splits: int | None = None,
    simulate: bool = False,
) -> Array:
    """`int8[M, K] x int8[K, N] -> dtype[M, N]`: `reference.scaled` of `reference.product`; the rest
    as in `gpu_product.product`.
    """
    columns = w.shape[1]
    w = jnp.pad(w, ((0, -len(w) % DEPTH if simulate else 0), (0, 0)))
    given = (Bytes(), w, columns, x, x_scales, scales, bias, addend)
    return product(*given, dtype=dtype, device=device, splits=splits, simulate=simulate)


@dataclass(frozen=True)
class Bytes:
    """A matrix `int8[K, N]`."""

    rows: int = DEPTH
    slot_bytes: int = DEPTH * WIDTH

    def ring(self, slots: int) -> Any:
        """See `gpu_product.Codes`."""
        return plgpu.SMEM((slots, DEPTH, WIDTH), jnp.int8, transforms=SWIZZLE)

    def source(self, stored: Any, step: Any, columns: Any) -> Any:
        """See `gpu_product.Codes`."""
        return stored.at[pl.ds(step * DEPTH, DEPTH), columns]

    def tile(self, slot: Any, warpgroup: Any, simulate: bool) -> Array:
        """See `gpu_product.Codes`."""
        if simulate:
            return slot[:, pl.ds(warpgroup * COLUMNS, COLUMNS)].T
        return operand(turned, DEPTH, slot, SWIZZLE)
