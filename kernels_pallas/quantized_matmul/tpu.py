"""The quantized product on TPUs: codes are read as they are stored and become bfloat16 in registers
on their way into the matrix unit.

    y  = sum_g scale_g * (x_g tile_g) + xsum (offset - scale * zero)      grid (M, N, K), K inner
    dx = [(dy * scale_g) tile_g^T]_g  + dy (offset - scale * zero)^T      grid (M, K, N), N inner

Scales are applied after the product of a group, so codes enter it exactly and a weight costs two
vector operations however large M is; only for groups under 16 rows, and for many rows of input on a
matrix unit deeper than a group, is the tile scaled and rounded to bfloat16 instead, as XLA does.

Static schedules of the compiler (M = 16, K = N = 4096, groups of 128; weights for each cycle of a
core, and what the memory delivers at the core's clock):

                     v4     v5e    v5p    v6e    7x
    4 bits          912    1613   1613   1603   1659      memory  1143  1093  1580  1874  3364
    3 bits          591    1085   1085   1090   1123              1524  1457  2107  2499  4485
    XLA, int4       423     469    469    863    879
    XLA, bfloat16   857    1263   1263   1208    545               286   273   395   469   841

so 4-bit weights stream at 0.5 to 1 times the bandwidth, and 2 to 3.4 times faster than XLA's
conversion of native int4. 8-bit codes with one scale a column are left to XLA, whose fused
conversion reaches the bandwidth (`api.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantized_matmul import reference
from kernels_pallas.quantized_matmul.cost import cost
from kernels_pallas.quantized_matmul.operand import Operand
from kernels_pallas.quantized_matmul.tpu_decode import (
    LANES,
    Decoded,
    decode,
    decoded,
    look_up,
    table_words,
)
from kernels_pallas.quantized_matmul.tpu_plan import (
    LOOK_UP,
    Plan,
    make_plan,
    stored_rows,
    unsupported,
)
from kernels_pallas.tpu_topology import GENERATIONS

__all__ = ["matmul", "matmul_transposed", "unsupported"]

Array = jax.Array


def matmul(
    x: Array,
    w: Operand,
    *,
    generation: str,
    dtype: Any = jnp.float32,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Array:
    """`[M, rows] -> dtype[M, N]`; see `reference.matmul`."""
    plan = plan or make_plan(x.shape[0], w, generation, x.dtype)
    m, groups = x.shape[0], -(-plan.rows // plan.group)
    sums = jnp.pad(_group_sums(x, w), ((0, 0), (0, groups - w.groups)))
    x = jnp.pad(x, ((0, 0), (0, plan.rows - w.rows)))
    width = plan.rows if plan.resident else plan.k
    route = LOOK_UP[generation]
    parts, specs = _parts(w, plan, route)
    return pl.pallas_call(
        functools.partial(_forward, w=_static(w), plan=plan, route=route),
        grid=(pl.cdiv(m, plan.m), pl.cdiv(w.columns, plan.n), plan.rows // plan.k),
        in_specs=[
            pl.BlockSpec((plan.m, width), lambda m, n, k: (m, 0 if plan.resident else k)),
            pl.BlockSpec((plan.m, groups), lambda m, n, k: (m, 0)),
            pl.BlockSpec((stored_rows(w, plan.k), plan.n), lambda m, n, k: (k, n)),
            *specs,
        ],
        out_specs=pl.BlockSpec((plan.m, plan.n), lambda m, n, k: (m, n)),
        out_shape=_shaped((m, w.columns), dtype, x, w.codes),
        scratch_shapes=[
            pltpu.VMEM((plan.m, plan.n), jnp.float32),
            pltpu.VMEM((groups, plan.n), jnp.float32),
            pltpu.VMEM((groups, plan.n), jnp.float32),
        ],
        compiler_params=_parameters(generation),
        cost_estimate=_estimate(m, w, x.dtype, dtype),
        interpret=interpret,
        name="quantized_matmul",
    )(x, sums, w.codes, *parts)


def matmul_transposed(
    dy: Array,
    w: Operand,
    *,
    generation: str,
    dtype: Any = jnp.float32,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Array:
    """`[M, N] -> dtype[M, rows]`; see `reference.matmul_transposed`. `dy * scale` is rounded to the
    type of `dy`.
    """
    plan = plan or make_plan(dy.shape[0], w, generation, dy.dtype, transposed=True)
    m, groups = dy.shape[0], -(-plan.rows // plan.group)
    how, fill = _decoded(w, centered=True), ((0, groups - w.groups), (0, 0))
    scaling = jnp.pad(w.scales.astype(jnp.float32) * how.factor, fill)
    adding = jnp.pad(reference.corrections(w), fill) - scaling * how.bias
    route = LOOK_UP[generation]
    table = [] if w.table is None else [table_words(w.table, route, plan.n)]
    per_group = pl.BlockSpec((groups, plan.n), lambda m, k, n: (0, n))
    dx = pl.pallas_call(
        functools.partial(_backward, w=_static(w), plan=plan, route=route),
        grid=(pl.cdiv(m, plan.m), plan.rows // plan.k, pl.cdiv(w.columns, plan.n)),
        in_specs=[
            pl.BlockSpec((plan.m, plan.n), lambda m, k, n: (m, n)),
            pl.BlockSpec((stored_rows(w, plan.k), plan.n), lambda m, k, n: (k, n)),
            per_group,
            per_group,
            *[pl.BlockSpec((16, plan.n), lambda m, k, n: (0, 0))] * len(table),
        ],
        out_specs=pl.BlockSpec((plan.m, plan.k), lambda m, k, n: (m, k)),
        out_shape=_shaped((m, plan.rows), jnp.float32, dy, w.codes),
        compiler_params=_parameters(generation),
        cost_estimate=_estimate(m, w, dy.dtype, jnp.float32),
        interpret=interpret,
        name="quantized_matmul_transposed",
    )(dy, w.codes, scaling, adding, *table)
    if not plan.scaled:
        exact = jax.lax.Precision.HIGHEST
        constant = jnp.dot(dy.astype(jnp.float32), adding.T, precision=exact)
        dx = dx + jnp.repeat(constant, plan.group, axis=1)[:, : plan.rows]
    return dx[:, : w.rows].astype(dtype)


def _group_sums(x: Array, w: Operand) -> Array:
    """The sum of the input over each group, `float32[M, groups]`; a product, since XLA would write
    the input out in another layout for a sum.
    """
    group = jnp.arange(w.rows, dtype=jnp.int32)[:, None] // w.group
    members = group == jnp.arange(w.groups, dtype=jnp.int32)
    return _dot(x, members.astype(x.dtype), 0)


def _forward(
    x: Any, sums: Any, codes: Any, scales: Any, *refs: Any, w: Operand, plan: Plan, route: str
) -> None:
    *optional, out, total, scaling, adding = refs
    zeros, offsets, table = _named(optional, w)
    step, how = pl.program_id(2), _decoded(w)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        scaling[...] = jnp.zeros_like(scaling)
        adding[...] = jnp.zeros_like(adding)
        scale = scales[...].astype(jnp.float32)
        zero = w.center if zeros is None else zeros[...].astype(jnp.float32)
        added = -scale * (zero + how.factor * how.bias)
        if offsets is not None:
            added = added + offsets[...].astype(jnp.float32)
        scaling[: scales.shape[0]] = scale * how.factor
        adding[: scales.shape[0]] = added

    def chunk(c: Array, _: None) -> None:
        first = pl.multiple_of(c * plan.chunk, plan.chunk)
        at = first + step * plan.k if plan.resident else first
        ours = x[:, pl.ds(pl.multiple_of(at, LANES), plan.chunk)]
        row = (step * plan.k + first) // plan.group
        tile = _tile(codes, first, w, plan, table, route).astype(ours.dtype)
        if plan.scaled:
            total[...] += _dot(ours, _scaled(tile, scaling, adding, row, plan), 0)
            return
        made = None
        for i, part in enumerate(_parts_of(plan)):
            product = _dot(ours[:, part], tile[part], 0) * scaling[pl.ds(row + i, 1), :]
            made = product if made is None else made + product
        total[...] += made

    jax.lax.fori_loop(0, plan.k // plan.chunk, chunk, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y = total[...]
        if not plan.scaled:
            y = y + jnp.dot(sums[...], adding[...], precision=jax.lax.Precision.HIGHEST)
        out[...] = y.astype(out.dtype)


def _backward(
    dy: Any, codes: Any, scaling: Any, adding: Any, *refs: Any, w: Operand, plan: Plan, route: str
) -> None:
    table, out = refs[0] if len(refs) == 2 else None, refs[-1]
    step_k, step = pl.program_id(1), pl.program_id(2)
    column = step * plan.n + jax.lax.broadcasted_iota(jnp.int32, (1, plan.n), 1)
    inside = column < w.columns  # what lies beyond the last column is not there

    @pl.when(step == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    ours = jnp.where(inside, dy[...], jnp.zeros((), dy.dtype))

    def chunk(c: Array, _: None) -> None:
        first = pl.multiple_of(c * plan.chunk, plan.chunk)
        row = (step_k * plan.k + first) // plan.group
        tile = _tile(codes, first, w, plan, table, route, centered=True).astype(dy.dtype)
        if plan.scaled:
            scaled = jnp.where(inside, _scaled(tile, scaling, adding, row, plan), 0)
            made = _dot(ours, scaled.astype(dy.dtype), 1)
        else:
            parts = []
            for i, part in enumerate(_parts_of(plan)):
                scale = jnp.where(inside, scaling[pl.ds(row + i, 1), :], 0)
                scaled = (ours.astype(jnp.float32) * scale).astype(dy.dtype)
                parts.append(_dot(scaled, tile[part], 1))
            made = jnp.concatenate(parts, axis=1)
        out[:, pl.ds(first, plan.chunk)] += made

    jax.lax.fori_loop(0, plan.k // plan.chunk, chunk, None)


def _tile(
    codes: Any,
    first: Array,
    w: Operand,
    plan: Plan,
    table: Any,
    route: str,
    centered: bool = False,
) -> Array:
    """The decoded tile `bfloat16[chunk, n]` of the codes from row `first` of the block on."""
    count = stored_rows(w, plan.chunk)
    stored = codes[pl.ds(pl.multiple_of(first // plan.chunk * count, count), count), :]
    if table is not None:
        return look_up(stored, w.bits, table[...], route)
    return decode(stored, w.packed, w.bits, centered)


def _scaled(tile: Array, scaling: Any, adding: Any, row: Array, plan: Plan) -> Array:
    """The tile with its scales and zeros, rounded to the type of the tile."""
    count = max(plan.chunk // plan.group, 1)
    parts = tile.astype(jnp.float32).reshape(count, plan.chunk // count, plan.n)
    made = [
        parts[i] * scaling[pl.ds(row + i, 1), :] + adding[pl.ds(row + i, 1), :]
        for i in range(count)
    ]
    return jnp.concatenate(made, axis=0).astype(tile.dtype)


def _parts_of(plan: Plan) -> list[slice]:
    """The rows of each group within a chunk."""
    depth = min(plan.chunk, plan.group)
    return [slice(i, i + depth) for i in range(0, plan.chunk, depth)]


def _parts(w: Operand, plan: Plan, route: str) -> tuple[list[Array], list[Any]]:
    """What comes after the codes: scales, then zeros, offsets and table where there are any."""
    arrays = [array for array in (w.scales, w.zeros, w.offsets) if array is not None]
    arrays = [a.astype(jnp.float32) if a.dtype == jnp.float16 else a for a in arrays]  # no loads
    specs = [pl.BlockSpec((w.groups, plan.n), lambda m, n, k: (0, n))] * len(arrays)
    if w.table is not None:
        arrays.append(table_words(w.table, route, plan.n))
        specs.append(pl.BlockSpec((16, plan.n), lambda m, n, k: (0, 0)))
    return arrays, specs


def _named(refs: list[Any], w: Operand) -> tuple[Any, Any, Any]:
    """Zeros, offsets and table of the references after the scales; None for those that are not."""
    left = iter(refs)
    return tuple(None if part is None else next(left) for part in (w.zeros, w.offsets, w.table))  # pyright: ignore[reportReturnType]


def _dot(a: Array, b: Array, over: int) -> Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (over,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _decoded(w: Operand, centered: bool = False) -> Decoded:
    return decoded(w.packed, w.bits, w.table is not None, centered)


def _static(w: Operand) -> Operand:
    """The operand with shapes in the place of arrays, for a kernel to hold."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), w)


def _shaped(shape: tuple[int, ...], dtype: Any, *inputs: Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that any of the inputs varies over."""
    kinds = [jax.typeof(x).manual_axis_type for x in inputs]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))


def _parameters(generation: str) -> Any:
    limit = GENERATIONS[generation].vmem_bytes
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=min(limit * 3 // 4, 64 * 2**20),
    )


def _estimate(m: int, w: Operand, dtype: Any, out: Any) -> pl.CostEstimate:
    options = {"bits": _bits(w), "group": w.group, "zeros": w.zeros is not None}
    flops, moved = cost(m, w.rows, w.columns, dtype=dtype, out=out, **options)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _bits(w: Operand) -> int:
    return w.bits if w.packed else w.codes.dtype.itemsize * 8
