"""The kernel of `stream` for Hopper GPUs.

A thread block takes a tile of queries for one kv head. One of its warpgroups copies blocks of keys
and values into a ring of slots (`copies_gpu`), as many in flight as fit; two others multiply 64
rows at a time, which is what one instruction of the tensor cores takes. A single decoding token
fills few of those rows, and that is no loss while the memory is waited for:

    a block of 64 keys and values of 128 channels   32 KiB
    its time at 3.35 or 4.8 TB/s over 132           1290 or 900 ns
    products, 64 exponentials a row, latencies      about 1300 cycles, 700 ns

That leaves one warpgroup no room on the faster memory, nor with 64 channels, so the two take the
blocks of a tile of up to 64 rows in turn and merge in the end. Four slots keep 128 KiB in flight,
where the memory's latency of 700 ns asks for 25 KiB. To occupy the whole GPU with few sequences,
the keys of each are split over thread blocks too, and the parts merged afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.decode_attention.copies_gpu import (
    KEYS,
    Call,
    References,
    Source,
    field,
    fill,
    named,
    place,
    start,
)
from kernels_pallas.decode_attention.scores_gpu import LOG2E, Span, iota, logits, visible
from kernels_pallas.decode_attention.stream import Items, Masking

Array = jax.Array
ROWS = 64
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40
"""Of a thread, where three warpgroups share them."""
NOWHERE = 1 << 30
"""Token of a row that only fills the tile."""
LOWEST = -1e30
"""Where a running maximum starts, and a hidden score; finite, so that nothing gives no NaN."""


class State(NamedTuple):
    """Of each row: weighted values, constant or running maximum (base 2), sum of exponentials."""

    values: Any
    peak: Any
    total: Any


def stream_attention(
    q: Array,
    arrays: Sequence[Array],
    items: Items,
    first: Array,
    *,
    masking: Masking,
    source: Source,
    layer: Any = 0,
    table: Array | None = None,
    slopes: Array | None = None,
    phi: Array | None = None,
    shared_bytes: int = 232_448,
    simulate: bool = False,
) -> tuple[Array, Array]:
    """Attention of every tile to the keys of its items.

    Args:
        q: `[tiles, kv_heads, rows, head_dim]`, rows a multiple of 8, at most 128.
        arrays: what keys and values are read from, in this order; one array may hold both.
        items: the work; `opens` and `closes` are not read.
        first: `int32[tiles * splits + 1]`, the first item of each tile's part.
        masking, source: static.
        layer, table: for `source`.
        slopes, phi: float32 `[kv_heads, rows]`, if `masking` asks for them.
        shared_bytes: most shared memory of a thread block.
        simulate: run in the simulator on a CPU.

    Returns:
        `[tiles * splits, kv_heads, rows, head_dim]` in q's dtype, and the log-sum-exp, float32
        `[tiles * splits, kv_heads, rows]`. Rows that see nothing give 0 and `-inf`.
    """
    tiles, kv_heads, rows, dim = q.shape
    call = call_of(masking, source, rows, dim, shared_bytes, simulate)
    parts = tiles * masking.splits
    per_row = [_whole_rows(x, call.pieces) for x in (slopes, phi) if x is not None]
    scalars = (jnp.stack(items), first, jnp.asarray(layer, jnp.int32).reshape(1))
    table = jnp.zeros((1, 1), jnp.int32) if table is None else table
    options: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(approx_math=True)}
    kernel = plgpu.kernel(
        functools.partial(_kernel, call, rows, len(arrays)),
        out_type=[
            jax.ShapeDtypeStruct((parts, kv_heads, rows, dim), q.dtype),
            jax.ShapeDtypeStruct((parts, kv_heads, rows), jnp.float32),
        ],
        scratch_types=_memory(call, dim, q.dtype),
        grid=(kv_heads, parts),
        grid_names=("head", "part"),
        num_threads=call.warpgroups + 1,
        thread_name="warpgroup",
        **(options | ({"interpret": gpu.simulator()} if simulate else {})),
    )
    row = jnp.arange(call.pieces * ROWS, dtype=jnp.int32)
    tokens = jnp.where(row < masking.tokens * masking.group, row // masking.group, NOWHERE)
    return kernel(*scalars, table, tokens, q, *per_row, *arrays)


def call_of(
    masking: Masking, source: Source, rows: int, dim: int, shared_bytes: int, simulate: bool
) -> Call:
    """Two warpgroups where they fit, and up to 6 blocks in flight: what shared memory holds beside
    the queries, what one warpgroup hands the other, and a slot for falling back.
    """
    unified, pieces = masking.unified is not None, -(-rows // ROWS)
    turns = 2 if pieces == 1 and dim <= 128 and not unified else 1
    left = shared_bytes - 8192 - pieces * turns * ROWS * dim * 2 - (turns - 1) * ROWS * dim * 4
    slots = max(2, min(6, left // (2 * KEYS * dim * 2) - unified))
    return Call(masking, source, pieces, turns, slots // turns * turns, simulate)


def _memory(call: Call, dim: int, dtype: Any) -> list[Any]:
    """Shared memory and barriers, as `References` names them from `q_own` on."""
    ring = call.slots + (call.masking.unified is not None)
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    per_row = plgpu.SMEM((ROWS,), jnp.float32)
    other = [plgpu.SMEM((ROWS, dim), jnp.float32, transforms=wide), per_row, per_row]
    return [
        gpu.tiles((call.warpgroups, ROWS, dim), dtype),
        gpu.tiles((ring, KEYS, dim), dtype),
        gpu.tiles((ring, KEYS, dim), dtype),
        plgpu.SMEM((call.warpgroups, ROWS), jnp.float32),
        *other * (call.turns - 1),
        plgpu.Barrier(num_barriers=call.warpgroups),
        plgpu.Barrier(num_arrivals=call.source.copies, num_barriers=ring),
        plgpu.Barrier(num_arrivals=call.source.copies, num_barriers=ring),
        plgpu.Barrier(num_arrivals=call.pieces, num_barriers=call.slots),
        *[plgpu.Barrier()] * (call.turns - 1),
    ]


def _whole_rows(x: Array, pieces: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, pieces * ROWS - x.shape[1])))


def _kernel(call: Call, rows: int, arrays: int, *refs: Any) -> None:
    r = named(call, arrays, refs)
    head, part = jax.lax.axis_index("head"), jax.lax.axis_index("part")
    warpgroup = jax.lax.axis_index("warpgroup")
    first, stop = r.first[part], r.first[part + 1]

    @pl.when(warpgroup < call.warpgroups)
    def _compute() -> None:
        if call.warpgroups > 1:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        state = _multiply(call, r, rows, head, part, warpgroup, first, stop)
        if call.turns == 1:
            _store(call, r, rows, head, part, warpgroup, state)
            return
        pl.when(warpgroup == 1)(lambda: _hand_over(r, state))

        @pl.when(warpgroup == 0)
        def _finish() -> None:
            _store(call, r, rows, head, part, warpgroup, _joined(call, r, state))

    @pl.when(warpgroup == call.warpgroups)
    def _copy() -> None:
        if call.warpgroups > 1:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        fill(call, r, head, first, stop)


def _multiply(
    call: Call, r: References, rows: int, head: Any, part: Any, warpgroup: Any, first: Any,
    stop: Any,
) -> State:  # fmt: skip
    """The softmax of a tile's part: of all its blocks, or of every other one."""
    masking, turns = call.masking, call.turns
    tile = jax.lax.div(part, jnp.int32(masking.splits))
    q, lse = r.q_own.at[warpgroup], r.lse_own.at[warpgroup]

    def load_queries(here: Any, own: Any) -> None:
        plgpu.copy_gmem_to_smem(r.q.at[tile, head, here], q.at[own], r.q_there.at[warpgroup])

    _for_rows(call, rows, warpgroup, load_queries)
    plgpu.barrier_wait(r.q_there.at[warpgroup])
    mine = pl.ds(warpgroup * ROWS if call.pieces > 1 else 0, ROWS)
    per_row = lambda x: gpu.load(x, gpu.of_rows(), call.simulate)  # noqa: E731
    tokens = per_row(r.tokens.at[mine]) + tile * masking.tokens
    slopes = None if r.slopes is None else per_row(r.slopes.at[head, mine])
    phi = None if r.phi is None else per_row(r.phi.at[head, mine]) * LOG2E
    attend = functools.partial(_attend, call, r, q, tokens, slopes)

    def item(index: Any, carry: Any) -> Any:
        state, before = carry
        blocks = field(r, "blocks", index)
        skipped = jax.lax.rem(before + warpgroup, jnp.int32(2)) if turns > 1 else jnp.int32(0)

        def block(number: Any, state: State) -> State:
            turn = skipped + number * turns
            slot = jax.lax.rem(before + turn, jnp.int32(call.slots))
            state = attend(index, turn, slot, state, phi is None)
            plgpu.barrier_arrive(r.free.at[slot])
            return state

        count = jax.lax.div(blocks - skipped + (turns - 1), jnp.int32(turns))
        state = jax.lax.fori_loop(0, count, block, state)
        if phi is not None:
            state = _fall_back(call, r, rows, head, index, tokens, lse, attend, state)
        return state, before + blocks

    initial = _initial(call, r.q.shape[-1], phi)
    return jax.lax.fori_loop(first, stop, item, (initial, jnp.int32(0)))[0]


def _hand_over(r: References, state: State) -> None:
    """The state of the second warpgroup, to the first."""
    for room, x in zip(r.other, state, strict=True):
        room[...] = x
    plgpu.barrier_arrive(r.other_there)


def _joined(call: Call, r: References, state: State) -> State:
    """Both warpgroups' states as one."""
    plgpu.barrier_wait(r.other_there)
    layouts = (gpu.matrix(), gpu.of_rows(), gpu.of_rows())
    other = State(
        *(gpu.load(x, layout, call.simulate) for x, layout in zip(r.other, layouts, strict=True))
    )
    peak = jnp.maximum(state.peak, other.peak)
    values, total = jnp.zeros_like(state.values), jnp.zeros_like(state.total)
    for x in (state, other):
        keep = jnp.exp2(x.peak - peak)
        values, total = values + x.values * gpu.down(keep, values.shape), total + x.total * keep
    return State(values, peak, total)


def _store(
    call: Call, r: References, rows: int, head: Any, part: Any, warpgroup: Any, state: State
) -> None:
    q, lse = r.q_own.at[warpgroup], r.lse_own.at[warpgroup]
    unseen = state.total <= 0  # false for NaN, which stays one
    safe = jnp.where(unseen, 1.0, state.total)
    q[...] = (state.values * gpu.down(1.0 / safe, state.values.shape)).astype(r.out.dtype)
    lse[...] = jnp.where(unseen, -jnp.inf, jnp.log(safe) + state.peak * (1 / LOG2E))
    plgpu.commit_smem()

    def store(here: Any, own: Any) -> None:
        plgpu.copy_smem_to_gmem(q.at[own], r.out.at[part, head, here])
        plgpu.copy_smem_to_gmem(lse.at[own], r.lse.at[part, head, here])

    _for_rows(call, rows, warpgroup, store)
    plgpu.wait_smem_to_gmem(0)


def _for_rows(call: Call, rows: int, warpgroup: Any, action: Callable[[Any, Any], None]) -> None:
    """`action(rows of the tile, rows of the warpgroup)`; the last piece may have fewer than 64."""
    if call.pieces == 1:
        action(pl.ds(0, rows), pl.ds(0, rows))
        return
    for number in range(call.pieces):
        count = min(ROWS, rows - number * ROWS)
        here, own = pl.ds(number * ROWS, count), pl.ds(0, count)
        pl.when(warpgroup == number)(functools.partial(action, here, own))


def _initial(call: Call, dim: int, peak: Any) -> State:
    zero = gpu.full((ROWS,), 0.0, call.simulate)
    lowest = gpu.full((ROWS,), LOWEST, call.simulate) if peak is None else peak
    return State(gpu.full((ROWS, dim), 0.0, call.simulate), lowest, zero)


def _attend(
    call: Call, r: References, q: Any, tokens: Any, slopes: Any, item: Any, turn: Any, slot: Any,
    state: State, online: bool,
) -> State:  # fmt: skip
    """Add one block of keys to the state of every row."""
    plgpu.barrier_wait(r.keys_there.at[slot])
    scores = gpu.product(q, r.keys.at[slot], call.simulate, transposed=True)
    at = place(r, item, turn)
    span = Span(
        begin=field(r, "begin", item),
        end=field(r, "end", item),
        shift=field(r, "shift", item),
        length=at.length,
        slot=at.block * KEYS,
    )
    seen, distance = visible(call.masking, span, tokens, scores.shape, call.simulate)
    scores = jnp.where(seen, logits(call.masking, scores, distance, slopes), LOWEST)
    values, peak, total = state
    if online:
        now = jnp.maximum(peak, jnp.max(scores, axis=1))
        keep = jnp.exp2(peak - now)
        values, total, peak = values * gpu.down(keep, values.shape), total * keep, now
    weights = jnp.exp2(scores - gpu.down(peak, scores.shape))
    weights = jnp.where(seen, weights, 0.0)
    total = total + jnp.sum(weights, axis=1)
    plgpu.barrier_wait(r.values_there.at[slot])
    left = at.length - at.block * KEYS
    pl.when(left < KEYS)(lambda: _clean(call, r.values.at[slot], left))
    weights = weights.astype(r.out.dtype)
    values = gpu.add_product(values, weights, r.values.at[slot], call.simulate)
    return State(values, peak, total)


def _clean(call: Call, values: Any, left: Any) -> None:
    """Zero what lies beyond the first `left` values; it is weighted by 0, but may be NaN."""
    x = gpu.load(values, gpu.matrix(), call.simulate)
    values[...] = jnp.where(iota(x.shape, 0, call.simulate) < left, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def _fall_back(
    call: Call, r: References, rows: int, head: Any, item: Any, tokens: Array, room: Any,
    attend: Callable[..., State], state: State,
) -> State:  # fmt: skip
    """Once more with the running maximum if a row of the item left the range; only the rows that
    did take what comes of it.
    """
    assert call.masking.unified is not None
    low, high = (math.exp(bound) for bound in call.masking.unified)
    mine = (tokens >= field(r, "begin", item)) & (tokens < field(r, "end", item))
    mine = mine & (tokens + field(r, "shift", item) >= 0)
    good = (state.total >= low) & (state.total <= high)  # false for NaN
    out_of_range = jnp.where(good, 0.0, jnp.where(mine, 1.0, 0.0))
    room[...] = out_of_range
    count = jax.lax.fori_loop(0, rows, lambda row, sum: sum + room[row], jnp.float32(0))

    def block(turn: Any, again: State) -> State:
        spare = call.slots + jnp.minimum(turn, 0)  # traced: JAX 0.12 takes no literal here
        start(call, r, head, place(r, item, turn), spare)
        return attend(item, turn, spare, again, True)

    blocks = jnp.where(count > 0, field(r, "blocks", item), 0)
    again = jax.lax.fori_loop(0, blocks, block, _initial(call, r.q.shape[-1], None))
    chosen = gpu.down(out_of_range, state.values.shape) > 0.5
    return State(
        jnp.where(chosen, again.values, state.values),
        jnp.where(out_of_range > 0.5, again.peak, state.peak),
        jnp.where(out_of_range > 0.5, again.total, state.total),
    )
