"""Integer products with a matrix that lies in planes of one bit each: the definition that every
implementation must match.

    planes uint32[bits, packed_rows(rows, 1), N]: bit i of every code, packed as 1-bit codes are

    value(code) = code                       "binary", 0 .. 2**bits - 1
                = code - 2**bits [top bit]   "signed", two's complement
                = 2 code - (2**bits - 1)     "bipolar", odd, every bit is worth +-2**i

A number that is left a plane is coarser, so one array serves several widths. The product is exact
in 32 bits, and ABQ-LLM (arXiv 2408.08554) and the bipolar integers of arXiv 2409.17870 are such
products; their engines multiply bit by bit, which no TPU and no kernel of Pallas can.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.packing import pack, unpack

Array = jax.Array

CODINGS = ("binary", "signed", "bipolar")


def pack_planes(codes: Array, bits: int) -> Array:
    """`[rows, N]` codes 0 .. 2**bits - 1 -> `uint32[bits, packed_rows(rows, 1), N]`."""
    return jnp.stack([pack((codes >> bit) & 1, 1) for bit in range(bits)])


def unpack_planes(planes: Array, rows: int | None = None) -> Array:
    """The codes `int32[rows, N]` of `pack_planes`; None for `rows` keeps what fills the last
    tile.
    """
    bits = jnp.arange(planes.shape[0])[:, None, None]
    return jnp.sum(unpack(planes, 1, rows, jnp.int32) << bits, axis=0)


def plane_values(bits: int, coding: str) -> tuple[list[int], int]:
    """What a 1 in each plane is worth, and what is added to their sum."""
    worth = [2**bit for bit in range(bits)]
    if coding == "signed":
        worth[-1] = -worth[-1]
    if coding == "bipolar":
        return [2 * value for value in worth], 1 - 2**bits
    return worth, 0


def matmul(x: Array, planes: Array, coding: str) -> Array:
    """`[M, rows] x planes -> int32[M, N]`, plane by plane."""
    worth, added = plane_values(planes.shape[0], coding)
    x = x.astype(jnp.int32)
    total = added * jnp.sum(x, axis=1, keepdims=True)
    for value, plane in zip(worth, planes, strict=True):
        ones = unpack(plane, 1, x.shape[1], jnp.int32)
        total = total + value * jnp.dot(x, ones)
    return total


def popcount_product(x: Array, planes: Array, rows: int) -> Array:
    """The product of two bipolar operands by exclusive or and bit count, as tensor cores with
    1-bit operands form it: `sum_ij 2**(i + j) (rows - 2 popcount(X_i ^ W_j))`.

    x: `uint32[x_bits, words, M]`, packed along its rows as `planes` is. Both are filled up with
    equal bits, which count for nothing.
    """
    total = jnp.zeros((x.shape[2], planes.shape[2]), jnp.int32)
    for i, of_x in enumerate(x):
        for j, of_w in enumerate(planes):
            differ = jax.lax.population_count(of_x[:, :, None] ^ of_w[:, None, :])
            counted = jnp.sum(differ.astype(jnp.int32), axis=0)
            total = total + 2 ** (i + j) * (rows - 2 * counted)
    return total
