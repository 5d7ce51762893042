"""8-bit products on TPUs: the row quantizer, which reads its input once, and the product with its
scales.

By the compiler's static schedules (K = N = 4096), the quantizer makes 1.4 to 3.7 times as many
codes a cycle as XLA, which reads the input twice. XLA's own product of 8-bit integers, with the
scales fused into it, reaches the bandwidth for few rows and most of the matrix unit for many:

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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.int8_matmul import reference
from kernels_pallas.int8_matmul.cost import cost, quantizer_cost
from kernels_pallas.tpu_topology import GENERATIONS

Array = jax.Array

EXACT_ROWS = 1024
"""Rows whose products of 8-bit integers float32 sums exactly."""
BLOCK_COLUMNS = 512
BLOCK_ROWS = 4096
MOST_ROWS = 256


def quantize_rows(
    x: Array, threshold: float | None, *, generation: str, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """See `reference.quantize_rows`."""
    m, columns = x.shape
    rows = max(32, min(256, 2**20 // max(columns, 1) // 32 * 32))
    blocks = pl.cdiv(m, rows)
    codes, scales, peaks = pl.pallas_call(
        functools.partial(_quantize, threshold=threshold, m=m),
        grid=(blocks,),
        in_specs=[pl.BlockSpec((rows, columns), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((rows, columns), lambda i: (i, 0)),
            pl.BlockSpec((rows, 1), lambda i: (i, 0)),
            pl.BlockSpec((8, columns), lambda i: (i, 0)),
        ],
        out_shape=[
            varying_shape((m, columns), jnp.int8, x),
            varying_shape((m, 1), jnp.float32, x),
            varying_shape((8 * blocks, columns), jnp.float32, x),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_limit(generation)
        ),
        cost_estimate=_estimate(quantizer_cost(m, columns, x.dtype)),
        interpret=interpret,
        name="quantize_rows",
    )(x)
    if threshold is None:
        return codes, scales[:, 0], jnp.zeros(columns, bool)
    outlier = jnp.max(peaks, axis=0) >= threshold
    return jnp.where(outlier, jnp.int8(0), codes), scales[:, 0], outlier


def _quantize(
    x: Any, codes: Any, scales: Any, peaks: Any, *, threshold: float | None, m: int
) -> None:
    found, scale, _ = reference.unmasked_rows(x[...], threshold)
    codes[...] = found
    scales[...] = scale[:, None]
    if threshold is not None:
        row = pl.program_id(0) * x.shape[0]
        row = row + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        size = jnp.where(row < m, jnp.abs(x[...].astype(jnp.float32)), 0.0)
        peaks[...] = jnp.broadcast_to(jnp.max(size, axis=0, keepdims=True), peaks.shape)


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
    block_m = min(MOST_ROWS, -(-m // 32) * 32)
    block_n = min(BLOCK_COLUMNS, -(-columns // 128) * 128)
    chunk = min(EXACT_ROWS, -(-rows // 128) * 128)
    chunks = -(-rows // chunk)
    together = -(-chunks // -(-chunks // max(BLOCK_ROWS // chunk, 1)))
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
            vmem_limit_bytes=_limit(generation),
        ),
        cost_estimate=_estimate(cost(m, rows, columns, dtype)),
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


def _limit(generation: str) -> int:
    return min(GENERATIONS[generation].vmem_bytes * 3 // 4, 64 * 2**20)


def _estimate(counts: tuple[int, int]) -> pl.CostEstimate:
    return pl.CostEstimate(flops=counts[0], bytes_accessed=counts[1], transcendentals=0)
