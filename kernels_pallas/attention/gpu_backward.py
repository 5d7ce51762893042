"""The backward kernels of flash attention for Hopper GPUs: one for queries (and slopes), one for
keys and values. Both recompute the scores; the formula is in `tpu_backward`.

The kernel of the queries is built like the forward kernel. That of keys and values holds 64 keys a
warpgroup and runs over the queries of all heads that share them, so that their gradients are summed
in registers; its scores are transposed, `[keys, queries]`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.attention.gpu_forward import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    ROWS,
    WARPGROUPS,
    Call,
    compiled,
    places,
    stream,
)
from kernels_pallas.attention.scores import Rules, logits, visible

Array = jax.Array


def of_queries(
    call: Call, blocks: Array, counts: Array, slopes: Array, query_places: Array,
    key_places: Array, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Gradients of queries, in their type, and each query's share in the slope's, float32.

    Takes what `gpu_forward.forward` takes, with `d_out`, `lse` and `delta` as `flash.Engine` has
    them, but by head.
    """
    batch, heads, queries, head_dim = q.shape
    value_dim = v.shape[-1]
    ring = (call.slots, call.columns)
    return plgpu.kernel(
        functools.partial(_queries_kernel, call, heads // k.shape[1]),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        scratch_types=[
            gpu.tiles((WARPGROUPS, ROWS, head_dim), q.dtype),
            gpu.tiles((WARPGROUPS, ROWS, value_dim), q.dtype),
            gpu.tiles((*ring, head_dim), q.dtype),
            gpu.tiles((*ring, value_dim), q.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.slots),
        ],
        grid=(heads, queries // (WARPGROUPS * ROWS), batch),
        grid_names=("head", "row", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **compiled(call.simulate),
    )(blocks, counts, slopes, query_places, key_places, q, k, v, d_out, lse, delta)


def _queries_kernel(
    call: Call, group: int, blocks: Any, counts: Any, slopes: Any, query_places: Any,
    key_places: Any, q: Any, k: Any, v: Any, d_out: Any, lse: Any, delta: Any, d_q: Any,
    d_slopes: Any, q_own: Any, d_out_own: Any, k_ring: Any, v_ring: Any, d_slopes_own: Any,
    own_there: Any, there: Any, free: Any,
) -> None:  # fmt: skip
    b, h, row = (jax.lax.axis_index(name) for name in ("batch", "head", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    whole, visits = counts[b, row, 0], counts[b, row, 1]

    @pl.when(warpgroup < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        here = pl.ds((row * WARPGROUPS + warpgroup) * ROWS, ROWS)
        mine = tuple(x.at[warpgroup] for x in (q_own, d_out_own))
        for source, target in zip((q, d_out), mine, strict=True):
            plgpu.copy_gmem_to_smem(source.at[b, h, here], target, own_there.at[warpgroup])
        plgpu.barrier_wait(own_there.at[warpgroup])
        vector = functools.partial(gpu.load, layout=gpu.of_rows(), simulate=call.simulate)
        rows = tuple(vector(query_places.at[b, i, here]) for i in range(2))
        scalars = tuple(vector(x.at[b, h, here]) for x in (lse, delta))
        slope = slopes[b, h]

        def step(s: Any, carry: Any, masked: bool) -> Any:
            total, share = carry
            slot = jax.lax.rem(s, jnp.int32(call.slots))
            plgpu.barrier_wait(there.at[slot])
            scores = gpu.product(mine[0], k_ring.at[slot], call.simulate, True)
            d_weights = gpu.product(mine[1], v_ring.at[slot], call.simulate, True)
            columns = key_places.at[b, :, pl.ds(blocks[b, row, s] * call.columns, call.columns)]
            where = None
            if masked or call.rules.alibi:
                where = places(rows, columns, scores.shape, call.simulate)
            of_row = tuple(gpu.down(x, scores.shape) for x in scalars)
            _, d_scores, of_slope = _shares(
                call.rules, scores, d_weights, where, slope, of_row, masked
            )
            if of_slope is not None:
                share -= jnp.sum(of_slope, axis=1)
            total = gpu.add_product(total, d_scores.astype(q.dtype), k_ring.at[slot], call.simulate)
            plgpu.barrier_arrive(free.at[slot])
            return total, share

        start = tuple(
            gpu.full(shape, 0.0, call.simulate) for shape in ((ROWS, q.shape[-1]), (ROWS,))
        )
        carry = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), start)
        total, share = jax.lax.fori_loop(whole, visits, functools.partial(step, masked=True), carry)
        mine[0][...] = (total * call.rules.scale).astype(q.dtype)
        d_slopes_own[warpgroup] = share
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine[0], d_q.at[b, h, here])
        plgpu.copy_smem_to_gmem(d_slopes_own.at[warpgroup], d_slopes.at[b, h, here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        own = jax.lax.div(h, jnp.int32(group))

        def place(s: Any) -> tuple[Any, ...]:
            return b, own, pl.ds(blocks[b, row, s] * call.columns, call.columns)

        both = [
            (lambda s: k.at[place(s)], k_ring, there, free),
            (lambda s: v.at[place(s)], v_ring, there, free),
        ]
        stream(visits, call.slots, both)


def of_keys(
    call: Call, blocks: Array, counts: Array, slopes: Array, query_places: Array,
    key_places: Array, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Gradients of keys and values, in their type; takes what `of_queries` takes, but rows of the
    visits are blocks of `WARPGROUPS * ROWS` keys, columns blocks of `call.columns` queries.
    """
    batch, kv_heads, keys, head_dim = k.shape
    value_dim = v.shape[-1]
    ring = (call.slots, call.columns)
    return plgpu.kernel(
        functools.partial(_keys_kernel, call, q.shape[1] // kv_heads),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch_types=[
            gpu.tiles((WARPGROUPS, ROWS, head_dim), k.dtype),
            gpu.tiles((WARPGROUPS, ROWS, value_dim), k.dtype),
            gpu.tiles((*ring, head_dim), k.dtype),
            gpu.tiles((*ring, value_dim), k.dtype),
            plgpu.SMEM(ring, jnp.float32),
            plgpu.SMEM(ring, jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=4, num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.slots),
        ],
        grid=(kv_heads, keys // (WARPGROUPS * ROWS), batch),
        grid_names=("head", "row", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **compiled(call.simulate),
    )(blocks, counts, slopes, query_places, key_places, q, k, v, d_out, lse, delta)


def _keys_kernel(
    call: Call, group: int, blocks: Any, counts: Any, slopes: Any, query_places: Any,
    key_places: Any, q: Any, k: Any, v: Any, d_out: Any, lse: Any, delta: Any, d_k: Any, d_v: Any,
    k_own: Any, v_own: Any, q_ring: Any, d_out_ring: Any, lse_ring: Any, delta_ring: Any,
    own_there: Any, there: Any, free: Any,
) -> None:  # fmt: skip
    b, n, row = (jax.lax.axis_index(name) for name in ("batch", "head", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    whole, visits = counts[b, row, 0], counts[b, row, 1]

    @pl.when(warpgroup < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        here = pl.ds((row * WARPGROUPS + warpgroup) * ROWS, ROWS)
        mine = tuple(x.at[warpgroup] for x in (k_own, v_own))
        for source, target in zip((k, v), mine, strict=True):
            plgpu.copy_gmem_to_smem(source.at[b, n, here], target, own_there.at[warpgroup])
        plgpu.barrier_wait(own_there.at[warpgroup])
        rows = tuple(
            gpu.load(key_places.at[b, i, here], gpu.of_rows(), call.simulate) for i in range(2)
        )

        def step(s: Any, carry: Any, r: Any, masked: bool) -> Any:
            of_k, of_v = carry
            slot = jax.lax.rem(r * visits + s, jnp.int32(call.slots))
            plgpu.barrier_wait(there.at[slot])
            scores = gpu.product(mine[0], q_ring.at[slot], call.simulate, True)
            d_weights = gpu.product(mine[1], d_out_ring.at[slot], call.simulate, True)
            columns = query_places.at[b, :, pl.ds(blocks[b, row, s] * call.columns, call.columns)]
            where = None
            if masked or call.rules.alibi:
                where = _transposed(rows, columns, scores.shape, call.simulate)
            of_column = tuple(
                gpu.across(gpu.load(x.at[slot], gpu.of_columns(), call.simulate), scores.shape)
                for x in (lse_ring, delta_ring)
            )
            weights, d_scores, _ = _shares(
                call.rules, scores, d_weights, where, slopes[b, n * group + r], of_column, masked
            )
            of_v = gpu.add_product(
                of_v, weights.astype(k.dtype), d_out_ring.at[slot], call.simulate
            )
            of_k = gpu.add_product(of_k, d_scores.astype(k.dtype), q_ring.at[slot], call.simulate)
            plgpu.barrier_arrive(free.at[slot])
            return of_k, of_v

        def head(r: Any, carry: Any) -> Any:
            first = functools.partial(step, r=r, masked=False)
            carry = jax.lax.fori_loop(0, whole, first, carry)
            return jax.lax.fori_loop(
                whole, visits, functools.partial(step, r=r, masked=True), carry
            )

        start = tuple(gpu.full((ROWS, x.shape[-1]), 0.0, call.simulate) for x in (k, v))
        of_k, of_v = jax.lax.fori_loop(0, group, head, start)
        mine[0][...] = (of_k * call.rules.scale).astype(k.dtype)
        mine[1][...] = of_v.astype(k.dtype)
        plgpu.commit_smem()
        for source, target in zip(mine, (d_k, d_v), strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[b, n, here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        once = jnp.maximum(visits, 1)

        def place(s: Any) -> tuple[Any, ...]:
            block = blocks[b, row, jax.lax.rem(s, once)]
            return b, n * group + jax.lax.div(s, once), pl.ds(block * call.columns, call.columns)

        pairs = ((q, q_ring), (d_out, d_out_ring), (lse, lse_ring), (delta, delta_ring))
        stream(
            visits * group,
            call.slots,
            [(lambda s, x=x: x.at[place(s)], ring, there, free) for x, ring in pairs],
        )


def _shares(
    rules: Rules, scores: Array, d_weights: Array, where: Any, slope: Array,
    of_query: tuple[Array, ...], masked: bool,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Weights of one block, gradients of its scores (without `scale`), and with slopes the share of
    each score in the slope's gradient.
    """
    lse, delta = of_query
    distance = None if where is None else where[0]
    shaped, bend = logits(rules, scores, distance, slope)
    weights = jnp.exp2(shaped - lse)
    if masked and where is not None:
        weights = jnp.where(visible(rules, *where), weights, 0.0)
    d_scores = weights * (d_weights - delta)
    if bend is not None:
        d_scores *= bend
    if not rules.alibi or distance is None:
        return weights, d_scores, None
    return weights, d_scores, d_scores * jnp.abs(distance).astype(jnp.float32)


def _transposed(
    rows: tuple[Array, ...], columns: Any, shape: tuple[int, ...], simulate: bool
) -> tuple[Array, Array, Array]:
    """`gpu_forward.places` of rows of keys by columns of queries."""
    distance, _, same = places(rows, columns, shape, simulate)
    return -distance, gpu.down(rows[0], shape), same
