"""The forward kernel of flash attention for Hopper GPUs (Shah et al. 2024, "FlashAttention-3").

A thread block has two warpgroups that compute, each for 64 queries of one head, and one that copies
keys and values of the visited blocks into a ring of slots. The two take turns on the tensor cores,
so that the softmax of one hides behind the products of the other. Which blocks are visited is data
(`visits.by_row`): first those that need no mask, then the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.attention.scores import LOG2E, NOTHING, Rules, logits, visible

Array = jax.Array

WARPGROUPS, ROWS = 2, 64
"""Warpgroups that compute, and rows of each: what one instruction of the tensor cores takes."""
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


@dataclass(frozen=True)
class Call:
    """Static arguments of a kernel. columns: keys of a block; slots: blocks of keys in flight;
    simulate: run in the simulator on a CPU.
    """

    rules: Rules
    columns: int
    slots: int = 2
    simulate: bool = False


def forward(
    call: Call, blocks: Array, counts: Array, slopes: Array, query_places: Array,
    key_places: Array, q: Array, k: Array, v: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Attention by head.

    Args:
        call: static.
        blocks, counts: of `visits.by_row`, for blocks of `WARPGROUPS * ROWS` queries by
            `call.columns` keys.
        slopes: `float32[batch, heads]`.
        query_places, key_places: as `flash.Engine` has them.
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, kv_heads, keys, head_dim]`.
        v: `[batch, kv_heads, keys, value_dim]`.

    Returns out `[batch, heads, queries, value_dim]` and the log-sum-exp, float32.
    """
    batch, heads, queries, head_dim = q.shape
    value_dim = v.shape[-1]
    ring = (call.slots, call.columns)
    return plgpu.kernel(
        functools.partial(_kernel, call, heads // k.shape[1]),
        out_type=[
            jax.ShapeDtypeStruct((batch, heads, queries, value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        scratch_types=[
            gpu.tiles((WARPGROUPS, ROWS, head_dim), q.dtype),
            gpu.tiles((*ring, head_dim), q.dtype),
            gpu.tiles((*ring, value_dim), q.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=call.slots),
            plgpu.Barrier(num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(heads, queries // (WARPGROUPS * ROWS), batch),
        grid_names=("head", "row", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **compiled(call.simulate),
    )(blocks, counts, slopes, query_places, key_places, q, k, v)


def compiled(simulate: bool) -> dict[str, Any]:
    """Options of `plgpu.kernel` that all kernels have."""
    options: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(approx_math=True)}
    return options | ({"interpret": gpu.simulator()} if simulate else {})


def _kernel(
    call: Call, group: int, blocks: Any, counts: Any, slopes: Any, query_places: Any,
    key_places: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, q_own: Any, k_ring: Any,
    v_ring: Any, lse_own: Any, q_there: Any, k_there: Any, v_there: Any, k_free: Any, v_free: Any,
    turn: Any,
) -> None:  # fmt: skip
    b, h, row = (jax.lax.axis_index(name) for name in ("batch", "head", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    whole, visits = counts[b, row, 0], counts[b, row, 1]

    @pl.when(warpgroup < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        here = pl.ds((row * WARPGROUPS + warpgroup) * ROWS, ROWS)
        q_mine, lse_mine = q_own.at[warpgroup], lse_own.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[b, h, here], q_mine, q_there.at[warpgroup])
        plgpu.barrier_wait(q_there.at[warpgroup])
        rows = tuple(
            gpu.load(query_places.at[b, i, here], gpu.of_rows(), call.simulate) for i in range(2)
        )
        slope = slopes[b, h]
        pl.when(warpgroup == 1)(lambda: _take_turns(turn))

        def step(s: Any, carry: Any, masked: bool) -> Any:
            total, peak, weight = carry
            slot = jax.lax.rem(s, jnp.int32(call.slots))
            plgpu.barrier_wait(k_there.at[slot])
            scores = gpu.product(
                q_mine, k_ring.at[slot], call.simulate, True, lambda: _take_turns(turn)
            )
            plgpu.barrier_arrive(k_free.at[slot])
            columns = key_places.at[b, :, pl.ds(blocks[b, row, s] * call.columns, call.columns)]
            scores = _logits(call, scores, rows, columns, slope, masked)
            now = jnp.maximum(peak, jnp.max(scores, axis=1))
            shrink = jnp.exp2(peak - now)
            weights = jnp.exp2(scores - gpu.down(now, scores.shape))
            total = total * gpu.down(shrink, total.shape)
            weight = weight * shrink + jnp.sum(weights, axis=1)
            weights = weights.astype(q.dtype)
            total, weight, now, weights = jax.lax.optimization_barrier(
                (total, weight, now, weights)
            )
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_there.at[slot])
            plgpu.barrier_wait(turn)
            total = gpu.add_product(total, weights, v_ring.at[slot], call.simulate)
            plgpu.barrier_arrive(v_free.at[slot])
            return total, now, weight

        start = tuple(
            gpu.full(shape, value, call.simulate)
            for shape, value in (((ROWS, v.shape[-1]), 0.0), ((ROWS,), NOTHING), ((ROWS,), 0.0))
        )
        carry = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), start)
        carry = jax.lax.fori_loop(whole, visits, functools.partial(step, masked=True), carry)
        pl.when(warpgroup == 0)(lambda: _take_turns(turn))
        total, peak, weight = carry
        seen = peak > NOTHING / 2
        safe = jnp.where(seen, weight, 1.0)
        share = jnp.where(seen, 1.0 / safe, 0.0)
        q_mine[...] = (total * gpu.down(share, total.shape)).astype(q.dtype)
        lse_mine[...] = jnp.where(seen, jnp.log(safe) + peak * (1 / LOG2E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_mine, out.at[b, h, here])
        plgpu.copy_smem_to_gmem(lse_mine, lse.at[b, h, here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        own = jax.lax.div(h, jnp.int32(group))

        def place(s: Any) -> tuple[Any, ...]:
            return b, own, pl.ds(blocks[b, row, s] * call.columns, call.columns)

        stream(
            visits,
            call.slots,
            [(lambda s: k.at[place(s)], k_ring, k_there, k_free)],
            [(lambda s: v.at[place(s)], v_ring, v_there, v_free)],
        )


def stream(steps: Any, slots: int, *groups: list[tuple[Any, Any, Any, Any]]) -> None:
    """Copy what each step needs into a ring of slots, as soon as a slot is free again.

    Each of the groups is a list of `(source of a step, ring, arrival barrier, barrier of free
    slots)`; those of one group share both barriers.
    """

    def free(s: Any) -> None:
        for group in groups:
            plgpu.barrier_wait(group[0][3].at[jax.lax.rem(s, jnp.int32(slots))])

    @pl.loop(0, steps)
    def _step(s: Any) -> None:
        slot = jax.lax.rem(s, jnp.int32(slots))
        for group in groups:
            pl.when(s >= slots)(lambda group=group: plgpu.barrier_wait(group[0][3].at[slot]))
            for source, ring, there, _ in group:
                plgpu.copy_gmem_to_smem(source(s), ring.at[slot], there.at[slot])

    pl.loop(jnp.maximum(steps - slots, 0), steps)(free)


def _take_turns(turn: Any) -> None:
    """Let the other warpgroup go on, and wait until it does the same."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _logits(
    call: Call, scores: Array, rows: tuple[Array, ...], columns: Any, slope: Array, masked: bool
) -> Array:
    """Base-2 logits of one block."""
    if not masked and not call.rules.alibi:
        return logits(call.rules, scores, None, slope)[0]
    distance, key_positions, same = places(rows, columns, scores.shape, call.simulate)
    shaped, _ = logits(call.rules, scores, distance, slope)
    if not masked:
        return shaped
    return jnp.where(visible(call.rules, distance, key_positions, same), shaped, NOTHING)


def places(
    rows: tuple[Array, ...], columns: Any, shape: tuple[int, ...], simulate: bool
) -> tuple[Array, Array, Array]:
    """Distances, positions of the keys, and whether the documents are the same, of rows of queries
    by columns of keys.
    """
    positions, documents = (
        gpu.across(gpu.load(columns.at[i], gpu.of_columns(), simulate), shape) for i in range(2)
    )
    return gpu.down(rows[0], shape) - positions, positions, gpu.down(rows[1], shape) == documents
