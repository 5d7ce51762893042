"""The product of 8-bit integers on TPUs, with its scales.

XLA's own, with the scales fused into it, reaches the bandwidth for few rows and most of the matrix
unit for many. By the compiler's static schedules (K = N = 4096):

    weights a cycle, M = 16              v4     v5e    v5p    v6e    7x
        XLA                             551    1395   1395   1196    991
        this kernel                     157    1799   1666   2615   2322
        memory                          571     547    790    937   1682
    products a cycle, thousands
        XLA, M = 512                      -     114    114    206    194
        this kernel, M = 256             22     113    111    269    271

so the product is left to XLA but on TPU7x, whose matrix unit takes no integers. There, and on v4,
codes are multiplied as bfloat16 and summed in float32 over at most 1024 rows at a time, which is
exact (`127**2 * 1024 < 2**24`), and then as 32-bit integers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.int8_matmul.cost import cost
from kernels_pallas.tpu_topology import GENERATIONS
from kernels_pallas.tuning import Key, best

Array = jax.Array

EXACT_ROWS = 1024
"""Rows whose products of 8-bit integers float32 sums exactly."""
BLOCKS = {"input_rows": 256, "columns": 512, "rows": 4096}
"""The largest blocks where nothing was measured: rows of input, columns, and rows of weights."""


def tuning_key(m: int, rows: int, columns: int, device_kind: str) -> Key:
    """What the blocks of a product are looked up by."""
    sizes = {"m": m, "rows": rows, "columns": columns}
    return Key.of("int8_matmul.tpu", sizes, "int8", device_kind)


def fits(blocks: Mapping[str, Any]) -> bool:
    """Whether blocks are whole tiles of 8-bit integers, and of as many rows as are summed."""
    units = {"input_rows": 32, "columns": 128, "rows": EXACT_ROWS}
    return all(blocks[name] > 0 == blocks[name] % unit for name, unit in units.items())


def int8_matmul(
    x: Array,
    w: Array,
    x_scales: Array,
    scales: Array,
    *,
    generation: str,
    dtype: Any,
    interpret: bool = False,
) -> Array:
    """`int8[M, K] x int8[K, N] -> dtype[M, N]`: `reference.scaled` of `reference.product`."""
    (m, rows), columns = x.shape, w.shape[1]
    key = tuning_key(m, rows, columns, GENERATIONS[generation].device_kind)
    most = best(key, BLOCKS, fits=fits)
    block_m = min(most["input_rows"], -(-m // 32) * 32)
    block_n = min(most["columns"], -(-columns // 128) * 128)
    chunk = min(EXACT_ROWS, -(-rows // 128) * 128)
    chunks = -(-rows // chunk)
    together = -(-chunks // -(-chunks // max(most["rows"] // chunk, 1)))
    block_k = together * chunk
    steps = -(-chunks // together)
    x = jnp.pad(x, ((0, 0), (0, steps * block_k - rows)))
    tile = pl.BlockSpec((block_m, block_n), lambda m, n, k: (m, n))
    return pl.pallas_call(
        functools.partial(_multiply, chunk=chunk, native=GENERATIONS[generation].int8 > 0),
        grid=(pl.cdiv(m, block_m), pl.cdiv(columns, block_n), steps),
        in_specs=[
            pl.BlockSpec((block_m, block_k), lambda m, n, k: (m, k)),
            pl.BlockSpec((block_k, block_n), lambda m, n, k: (k, n)),
            pl.BlockSpec((block_m, 1), lambda m, n, k: (m, 0)),
            pl.BlockSpec((1, block_n), lambda m, n, k: (0, n)),
        ],
        out_specs=tile,
        out_shape=varying_shape((m, columns), dtype, x, w),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(generation),
        ),
        cost_estimate=estimate(cost(m, rows, columns, dtype)),
        interpret=interpret,
        name="int8_matmul",
    )(x, w, x_scales[:, None], scales[None].astype(jnp.float32))


def _multiply(
    x: Any, w: Any, x_scales: Any, scales: Any, out: Any, total: Any, *, chunk: int, native: bool
) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(c: Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        total[...] += int8_product(x[:, rows], w[rows, :], native)

    jax.lax.fori_loop(0, x.shape[1] // chunk, add, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y = total[...].astype(jnp.float32) * x_scales[...] * scales[...]
        out[...] = y.astype(out.dtype)


def int8_product(x: Array, w: Array, native: bool) -> Array:
    """The exact `int32` product of up to `EXACT_ROWS` rows, inside a kernel. native: whether the
    matrix unit takes integers.
    """
    if native:
        return jnp.dot(x, w, preferred_element_type=jnp.int32)
    kind = jnp.bfloat16
    exact = jnp.dot(x.astype(kind), w.astype(kind), preferred_element_type=jnp.float32)
    return exact.astype(jnp.int32)


def varying_shape(shape: tuple[int, ...], dtype: Any, *inputs: Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that any of the inputs varies over."""
    kinds = [jax.typeof(x).manual_axis_type for x in inputs]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))


def vmem_limit(generation: str) -> int:
    """Of a kernel, in bytes."""
    return min(GENERATIONS[generation].vmem_bytes * 3 // 4, 64 * 2**20)


def estimate(counts: tuple[int, int]) -> pl.CostEstimate:
    """What the compiler is told of `(operations, bytes)`."""
    return pl.CostEstimate(flops=counts[0], bytes_accessed=counts[1], transcendentals=0)
