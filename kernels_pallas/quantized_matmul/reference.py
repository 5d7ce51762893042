"""The quantized product in plain `jax.numpy`: the definition that every implementation must match.

    W[k, n] = scale[g, n] * (value(code[k, n]) - zero[g, n]) + offset[g, n],   g = k // group
    y = x W      dx = dy W^T      dW = x^T dy

A code stands for itself or for an entry of a table, which is rounded to the type of `x`, as a dense
weight would be. Sums are in float32. `matmul` and `matmul_transposed` are also what an accelerator
runs where there is no kernel: XLA moves the conversion of 8-bit codes into the product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.operand import Operand
from kernels_pallas.quantized_matmul.packing import unpack

Array = jax.Array


def matmul(x: Array, w: Operand) -> Array:
    """`[M, rows] -> float32[M, N]`."""
    if w.groups > 1:
        return _dot(x, dequantize(w, x.dtype), 0)
    y = _dot(x, values(w, x.dtype).astype(x.dtype), 0) * w.scales.astype(jnp.float32)
    return y + jnp.sum(x, axis=1, keepdims=True, dtype=jnp.float32) * corrections(w)


def matmul_transposed(dy: Array, w: Operand) -> Array:
    """`[M, N] -> float32[M, rows]`."""
    if w.groups > 1:
        return _dot(dy, dequantize(w, dy.dtype), 1)
    scaled = (dy.astype(jnp.float32) * w.scales.astype(jnp.float32)).astype(dy.dtype)
    dx = _dot(scaled, values(w, dy.dtype).astype(dy.dtype), 1)
    return dx + jnp.sum(dy.astype(jnp.float32) * corrections(w), axis=1, keepdims=True)


def parameter_gradients(x: Array, dy: Array, w: Operand) -> Operand:
    """The gradients of scales, zeros, offsets and table, given those of the product, in the place
    of the arrays themselves (None for codes and select).
    """
    dw = jnp.dot(x.T, dy.astype(x.dtype), preferred_element_type=jnp.float32)
    return dequantize_vjp(dw, w, x.dtype)


def dequantize(w: Operand, dtype: Any) -> Array:
    """The matrix `dtype[rows, N]`, computed in float32; a table's entries are rounded to `dtype`
    before.
    """
    shape = (w.groups, w.group, w.columns)
    scaled = values(w, dtype).reshape(shape) * w.scales.astype(jnp.float32)[:, None]
    return (scaled + corrections(w)[:, None]).reshape(w.rows, w.columns).astype(dtype)


def dequantize_vjp(dw: Array, w: Operand, dtype: Any) -> Operand:
    """The cotangents of `w` from those of `dequantize(w, float32)`; None for whole numbers."""
    parts = (w.scales, w.zeros, w.offsets, w.table)

    def of(parts: Any) -> Array:
        rounded = None if parts[3] is None else parts[3].astype(dtype).astype(jnp.float32)
        return dequantize(_with(w, parts[0], parts[1], parts[2], rounded), jnp.float32)

    scales, zeros, offsets, table = jax.vjp(of, parts)[1](dw)[0]
    return _with(w, scales, zeros, offsets, table, whole=False)


def _with(w: Operand, scales: Any, zeros: Any, offsets: Any, table: Any, whole: bool = True) -> Any:
    """The operand with other arrays; without the whole numbers, which have no gradients."""
    numbers = {} if whole else {"codes": None, "select": None}
    return replace(w, scales=scales, zeros=zeros, offsets=offsets, table=table, **numbers)


def values(w: Operand, dtype: Any) -> Array:
    """What the codes stand for, `float32[rows, N]`: whole numbers, or entries of the table."""
    codes = unpack(w.codes, w.bits, w.rows) if w.packed else w.codes
    if w.table is None:
        return codes.astype(jnp.int32).astype(jnp.float32)
    table = w.table.astype(dtype).astype(jnp.float32)
    if w.select is None:
        return look_up(table, codes)
    tables = jnp.repeat(w.select.astype(jnp.int32), w.group, axis=0)
    return table[tables, codes.astype(jnp.int32)]


def look_up(table: Array, codes: Array) -> Array:
    """`table[codes]`; up to 16 entries by a tree of selections, which vectorises everywhere."""
    if table.shape[0] > 16:
        return table[codes.astype(jnp.int32)]
    codes, level = codes.astype(jnp.uint32), list(table)
    for bit in range(table.shape[0].bit_length() - 1):
        odd = (codes >> bit) & 1 == 1
        level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def corrections(w: Operand) -> Array:
    """What is added to `scale * value`, `float32[groups, N]`: `offset - scale * zero`."""
    zeros = w.center if w.zeros is None else w.zeros.astype(jnp.float32)
    added = -w.scales.astype(jnp.float32) * zeros
    return added if w.offsets is None else added + w.offsets.astype(jnp.float32)


def _dot(a: Array, b: Array, over: int) -> Array:
    return jax.lax.dot_general(
        a, b, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32
    )
