"""The kernel of `stream` for Hopper GPUs.

A thread block takes a tile of queries for one kv head. One of its warpgroups copies blocks of keys
and values into a ring of slots, as many in flight as fit; one or two others multiply, 64 rows each,
which is what one instruction of the tensor cores takes. A single decoding token fills few of those
rows, and that is no loss: reading the keys takes longer than multiplying them by 64 rows. To occupy
the whole GPU with few sequences, the keys of each are split, and the parts merged afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.decode_attention.scores_gpu import LOG2E, Span, iota, logits, visible
from kernels_pallas.decode_attention.stream import Items, Masking, Place

Array = jax.Array
ROWS = 64
KEYS = 64
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40
"""Of a thread, where three warpgroups share them."""
NOWHERE = 1 << 30
"""Token of a row that only fills the tile."""
LOWEST = -1e30
"""Where a running maximum starts, and a hidden score; finite, so that nothing gives no NaN."""


class Source(Protocol):
    """Keys and values in memory, of which a block is `KEYS` tokens."""

    @property
    def copies(self) -> int:
        """That make up the keys of a block; the values take as many."""
        ...

    def start(
        self, copy: Callable[[Any, Any], None], array: Any, which: int, slot: Any, head: Any,
        at: Place,
    ) -> None:  # fmt: skip
        """`copy(source, destination)` for each piece of the keys (0) or values (1) of a block."""
        ...


@dataclass(frozen=True)
class Call:
    """Static. warpgroups: that multiply. slots: blocks in flight. simulate: run on a CPU."""

    masking: Masking
    source: Source
    warpgroups: int
    slots: int
    simulate: bool


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
    warpgroups = -(-rows // ROWS)
    slots = slots_for(warpgroups, dim, masking, shared_bytes)
    call = Call(masking, source, warpgroups, slots, simulate)
    ring = slots + (masking.unified is not None)
    parts = tiles * masking.splits
    per_row = [_whole_rows(x, warpgroups) for x in (slopes, phi) if x is not None]
    scalars = (jnp.stack(items), first, jnp.asarray(layer, jnp.int32).reshape(1))
    table = jnp.zeros((1, 1), jnp.int32) if table is None else table
    options: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(approx_math=True)}
    kernel = plgpu.kernel(
        functools.partial(_kernel, call, rows, len(arrays)),
        out_type=[
            jax.ShapeDtypeStruct((parts, kv_heads, rows, dim), q.dtype),
            jax.ShapeDtypeStruct((parts, kv_heads, rows), jnp.float32),
        ],
        scratch_types=[
            gpu.tiles((warpgroups, ROWS, dim), q.dtype),
            gpu.tiles((ring, KEYS, dim), q.dtype),
            gpu.tiles((ring, KEYS, dim), q.dtype),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=source.copies, num_barriers=ring),
            plgpu.Barrier(num_arrivals=source.copies, num_barriers=ring),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slots),
        ],
        grid=(kv_heads, parts),
        grid_names=("head", "part"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        **(options | ({"interpret": gpu.simulator()} if simulate else {})),
    )
    row = jnp.arange(warpgroups * ROWS, dtype=jnp.int32)
    tokens = jnp.where(row < masking.tokens * masking.group, row // masking.group, NOWHERE)
    return kernel(*scalars, table, tokens, q, *per_row, *arrays)


def slots_for(warpgroups: int, dim: int, masking: Masking, shared_bytes: int) -> int:
    """Blocks in flight: up to 6, and what fits beside the queries and a slot for falling back."""
    block = 2 * KEYS * dim * 2
    left = shared_bytes - 8192 - warpgroups * ROWS * dim * 2
    return max(2, min(6, left // block - (masking.unified is not None)))


def _whole_rows(x: Array, warpgroups: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, warpgroups * ROWS - x.shape[1])))


class References(NamedTuple):
    """What the kernel is given: scalars, arrays, results, and memory to work in."""

    items: Any
    first: Any
    layer: Any
    table: Any
    tokens: Any
    q: Any
    slopes: Any
    phi: Any
    arrays: Any
    out: Any
    lse: Any
    q_own: Any
    keys: Any
    values: Any
    lse_own: Any
    q_there: Any
    keys_there: Any
    values_there: Any
    free: Any


def _named(masking: Masking, arrays: int, refs: Sequence[Any]) -> References:
    left = list(refs)
    optional = {"slopes": masking.alibi, "phi": masking.unified is not None}
    named: dict[str, Any] = {}
    for name in References._fields:
        count = arrays if name == "arrays" else optional.get(name, 1)
        taken, left = left[:count], left[count:]
        named[name] = taken if name == "arrays" else taken[0] if taken else None
    return References(**named)


def _kernel(call: Call, rows: int, arrays: int, *refs: Any) -> None:
    r = _named(call.masking, arrays, refs)
    head, part = jax.lax.axis_index("head"), jax.lax.axis_index("part")
    warpgroup = jax.lax.axis_index("warpgroup")
    start, stop = r.first[part], r.first[part + 1]

    @pl.when(warpgroup < call.warpgroups)
    def _compute() -> None:
        if call.warpgroups > 1:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _multiply(call, r, rows, head, part, warpgroup, start, stop)

    @pl.when(warpgroup == call.warpgroups)
    def _copy() -> None:
        if call.warpgroups > 1:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        _fill(call, r, head, start, stop)


def _field(r: References, name: str, item: Any) -> Any:
    return r.items[Items._fields.index(name), item]


def _place(r: References, item: Any, turn: Any) -> Place:
    sinks, first = _field(r, "sink_blocks", item), _field(r, "first", item)
    block = jnp.where(turn < sinks, turn, first + turn - sinks)
    return Place(r.table, r.layer[0], _field(r, "sequence", item), _field(r, "length", item), block)


def _start(call: Call, r: References, head: Any, place: Place, slot: Any) -> None:
    """Copy the block at a place into a slot."""
    for which, ring, there in ((0, r.keys, r.keys_there), (1, r.values, r.values_there)):

        def copy(source: Any, destination: Any, there: Any = there) -> None:
            plgpu.copy_gmem_to_smem(source, destination, there.at[slot])

        array = r.arrays[min(which, len(r.arrays) - 1)]
        call.source.start(copy, array, which, ring.at[slot], head, place)


def _fill(call: Call, r: References, head: Any, start: Any, stop: Any) -> None:
    """The blocks of all items, each as soon as its slot is free again."""

    def item(index: Any, step: Any) -> Any:
        def block(turn: Any, step: Any) -> Any:
            slot = jax.lax.rem(step, jnp.int32(call.slots))
            pl.when(step >= call.slots)(lambda: plgpu.barrier_wait(r.free.at[slot]))
            _start(call, r, head, _place(r, index, turn), slot)
            return step + 1

        return jax.lax.fori_loop(0, _field(r, "blocks", index), block, step)

    steps = jax.lax.fori_loop(start, stop, item, jnp.int32(0))

    def drain(step: Any, _: Any) -> Any:
        plgpu.barrier_wait(r.free.at[jax.lax.rem(step, jnp.int32(call.slots))])
        return _

    jax.lax.fori_loop(jnp.maximum(steps - call.slots, 0), steps, drain, jnp.int32(0))


def _multiply(
    call: Call, r: References, rows: int, head: Any, part: Any, warpgroup: Any, start: Any,
    stop: Any,
) -> None:  # fmt: skip
    """The softmax of the items of a tile's part, and what comes of it."""
    masking = call.masking
    tile = jax.lax.div(part, jnp.int32(masking.splits))
    q, lse = r.q_own.at[warpgroup], r.lse_own.at[warpgroup]

    def load_queries(here: Any, own: Any) -> None:
        plgpu.copy_gmem_to_smem(r.q.at[tile, head, here], q.at[own], r.q_there.at[warpgroup])

    _for_rows(call, rows, warpgroup, load_queries)
    plgpu.barrier_wait(r.q_there.at[warpgroup])
    mine = pl.ds(warpgroup * ROWS, ROWS)
    per_row = lambda x: gpu.load(x, gpu.of_rows(), call.simulate)  # noqa: E731
    tokens = per_row(r.tokens.at[mine]) + tile * masking.tokens
    slopes = None if r.slopes is None else per_row(r.slopes.at[head, mine])
    phi = None if r.phi is None else per_row(r.phi.at[head, mine]) * LOG2E
    attend = functools.partial(_attend, call, r, q, tokens, slopes)

    def item(index: Any, carry: Any) -> Any:
        def block(turn: Any, carry: Any) -> Any:
            state, step = carry
            slot = jax.lax.rem(step, jnp.int32(call.slots))
            state = attend(index, turn, slot, state, phi is None)
            plgpu.barrier_arrive(r.free.at[slot])
            return state, step + 1

        state, step = jax.lax.fori_loop(0, _field(r, "blocks", index), block, carry)
        if phi is not None:
            state = _fall_back(call, r, rows, head, index, tokens, lse, attend, state)
        return state, step

    initial = _initial(call, r.q.shape[-1], phi)
    state, _ = jax.lax.fori_loop(start, stop, item, (initial, jnp.int32(0)))
    seen = state.total > 0
    safe = jnp.where(seen, state.total, 1.0)
    q[...] = (state.values * gpu.down(1.0 / safe, state.values.shape)).astype(r.out.dtype)
    lse[...] = jnp.where(seen, jnp.log(safe) + state.peak * (1 / LOG2E), -jnp.inf)
    plgpu.commit_smem()

    def store(here: Any, own: Any) -> None:
        plgpu.copy_smem_to_gmem(q.at[own], r.out.at[part, head, here])
        plgpu.copy_smem_to_gmem(lse.at[own], r.lse.at[part, head, here])

    _for_rows(call, rows, warpgroup, store)
    plgpu.wait_smem_to_gmem(0)


def _for_rows(call: Call, rows: int, warpgroup: Any, action: Callable[[Any, Any], None]) -> None:
    """`action(rows of the tile, rows of the warpgroup)`; the last may have fewer than 64."""
    for number in range(call.warpgroups):
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
    place = _place(r, item, turn)
    span = Span(
        begin=_field(r, "begin", item),
        end=_field(r, "end", item),
        shift=_field(r, "shift", item),
        length=place.length,
        slot=place.block * KEYS,
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
    left = place.length - place.block * KEYS
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
    mine = (tokens >= _field(r, "begin", item)) & (tokens < _field(r, "end", item))
    mine = mine & (tokens + _field(r, "shift", item) >= 0)
    good = (state.total >= low) & (state.total <= high)  # false for NaN
    out_of_range = jnp.where(good, 0.0, jnp.where(mine, 1.0, 0.0))
    room[...] = out_of_range
    count = jax.lax.fori_loop(0, rows, lambda row, sum: sum + room[row], jnp.float32(0))

    def block(turn: Any, again: State) -> State:
        spare = call.slots + jnp.minimum(turn, 0)  # traced: JAX 0.12 takes no literal here
        _start(call, r, head, _place(r, item, turn), spare)
        return attend(item, turn, spare, again, True)

    blocks = jnp.where(count > 0, _field(r, "blocks", item), 0)
    again = jax.lax.fori_loop(0, blocks, block, _initial(call, r.q.shape[-1], None))
    chosen = gpu.down(out_of_range, state.values.shape) > 0.5
    return State(
        jnp.where(chosen, again.values, state.values),
        jnp.where(out_of_range > 0.5, again.peak, state.peak),
        jnp.where(out_of_range > 0.5, again.total, state.total),
    )
