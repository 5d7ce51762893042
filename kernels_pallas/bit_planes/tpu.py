"""The product with bit planes on TPUs: planes become 8-bit codes in registers, then one product.

No TPU multiplies single bits, and on the vector unit exclusive or and bit count lose at any size.
So few planes save memory and bandwidth and no operations: a code costs 3 vector operations for
each plane and 4096 codes. A byte of the codes is in row `16 (i + 8 b) + 2 t + h` for shift i, byte
`2 h + b` of word row t: the columns of `x` are put in that order, which costs nothing against the
planes. By the compiler's static schedules (M = 16, K = N = 4096; weights a cycle of a core):

                 v4     v5e    v6e    7x       memory, v5e
    2 planes    146    1450   2060   1635         2187
    3 planes    134    1177   1503   1321         1458
    4 planes    124    1049   1249   1053         1093
    8 planes     95     612    671    578          547

v4 has no fast conversion of bytes: there, codes in words (`quantized_matmul`) are the better form.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.bit_planes.cost import cost
from kernels_pallas.int8_matmul.tpu import fits, int8_product, varying_shape
from kernels_pallas.tpu_topology import GENERATIONS
from kernels_pallas.tuning import Key, best

Array = jax.Array

TILE, WORDS = 256, 8
"""Rows of codes, and rows of words of each plane, that are decoded together."""
CHUNK_TILES = 4
"""Tiles of one product: 1024 rows, whose products of 8-bit integers float32 sums exactly."""
BLOCKS = {"input_rows": 256, "columns": 512, "rows": 4096}
"""The largest blocks where nothing was measured: rows of input, columns, and rows of codes."""
BYTES = 0x01010101


def tuning_key(m: int, rows: int, columns: int, bits: int, device_kind: str) -> Key:
    """What the blocks of a product are looked up by."""
    sizes = {"m": m, "rows": rows, "columns": columns}
    return Key.of("bit_planes.tpu", sizes, "int8", device_kind, bits=bits)


def matmul(
    x: Array, planes: Array, coding: str, *, generation: str, interpret: bool = False
) -> Array:
    """`int8[M, rows] x planes -> int32[M, N]`; see `reference.matmul`."""
    (bits, words, columns), m = planes.shape, x.shape[0]
    turned, factor, offset = byte_values(bits, coding)
    kind = GENERATIONS[generation].device_kind
    most = best(tuning_key(m, x.shape[1], columns, bits, kind), BLOCKS, fits=fits)
    chunks = -(-words // (WORDS * CHUNK_TILES))
    together = -(-chunks // -(-chunks // (most["rows"] // (TILE * CHUNK_TILES))))
    steps, block_k = -(-chunks // together), together * TILE * CHUNK_TILES
    block_m = min(most["input_rows"], -(-m // 32) * 32)
    block_n = min(most["columns"], -(-columns // 128) * 128)
    x = jnp.pad(x, ((0, 0), (0, steps * block_k - x.shape[1])))
    total = pl.pallas_call(
        functools.partial(_multiply, turned=turned, native=GENERATIONS[generation].int8 > 0),
        grid=(pl.cdiv(m, block_m), pl.cdiv(columns, block_n), steps),
        in_specs=[
            pl.BlockSpec((block_m, block_k), lambda m, n, k: (m, k)),
            pl.BlockSpec((bits, block_k // 32, block_n), lambda m, n, k: (0, k, n)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda m, n, k: (m, n)),
        out_shape=varying_shape((m, columns), jnp.int32, x, planes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_estimate(m, x.shape[1], columns, bits),
        interpret=interpret,
        name="bit_planes_matmul",
    )(by_bytes(x), planes)
    return factor * total + offset * jnp.sum(x.astype(jnp.int32), axis=1, keepdims=True)


def byte_values(bits: int, coding: str) -> tuple[bool, int, int]:
    """How a signed byte stands for a code: whether its top bit is turned over, and `value = factor
    * byte + offset`. The top bit of 8 is turned so that a byte holds it, that of a signed code so
    that it is worth `2**bits` less where it is 1.
    """
    turned, half = (coding == "signed") != (bits == 8), 2 ** (bits - 1)
    if coding == "signed":
        return turned, 1, -half if turned else 0
    shift = half if turned else 0
    return (turned, 2, 2 * shift + 1 - 2**bits) if coding == "bipolar" else (turned, 1, shift)


def _multiply(x: Any, planes: Any, out: Any, *, turned: bool, native: bool) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    rows, words = TILE * CHUNK_TILES, WORDS * CHUNK_TILES

    def add(c: Array, _: None) -> None:
        ours = x[:, pl.ds(pl.multiple_of(c * rows, rows), rows)]
        stored = [
            planes[bit, pl.ds(pl.multiple_of(c * words, words), words), :]
            for bit in range(planes.shape[0])
        ]
        if turned:
            stored[-1] = ~stored[-1]
        out[...] += int8_product(ours, _decoded(stored), native)

    jax.lax.fori_loop(0, x.shape[1] // rows, add, None)


def _decoded(planes: list[Array]) -> Array:
    """Planes `uint32[words, columns]` -> `int8[32 * words, columns]`, rows as `by_bytes` has
    them.
    """
    tiles = [plane.reshape(-1, WORDS, plane.shape[-1]) for plane in planes]
    slabs = []
    for shift in range(8):
        parts = []
        for bit, plane in enumerate(tiles):
            moved = (
                plane << jnp.uint32(bit - shift)
                if bit > shift
                else plane >> jnp.uint32(shift - bit)
            )
            parts.append(moved & jnp.uint32(BYTES << bit))
        slabs.append(functools.reduce(jnp.bitwise_or, parts))
    stacked = jnp.stack(slabs, axis=1)
    return pltpu.bitcast(stacked.reshape(-1, stacked.shape[-1]), jnp.int8)


def by_bytes(x: Array) -> Array:
    """The columns of `x` in the order of `_decoded`: within a tile by shift, word row, byte."""
    m, columns = x.shape
    parts = x.reshape(m, columns // TILE, 2, 8, WORDS, 2)  # byte's lower bit, shift, t, h
    return parts.transpose(0, 1, 3, 4, 5, 2).reshape(m, columns)


def _estimate(m: int, rows: int, columns: int, bits: int) -> pl.CostEstimate:
    operations, moved = cost(m, rows, columns, bits)
    return pl.CostEstimate(flops=operations, bytes_accessed=moved, transcendentals=0)
