"""The TPU kernel of `stream`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode_attention.stream import Blocks, Items, Masking, Place

Array = jax.Array
LANES = 128
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Where a running maximum starts: finite, so that rows that see nothing give no NaN."""


class State(NamedTuple):
    """Of each row: constant or running maximum, sum of exponentials, weighted values; the first two
    in all lanes.
    """

    peak: Any
    total: Any
    values: Any


class References(NamedTuple):
    """What the kernel is given: scalars, arrays, results, and memory to work in."""

    items: Any
    count: Any
    layer: Any
    table: Any
    q: Any
    slopes: Any
    phi: Any
    arrays: Any
    out: Any
    lse: Any
    buffers: Any
    semaphores: Any
    turn: Any
    state: State
    again: State | None


def stream_attention(
    q: Array,
    arrays: Sequence[Array],
    items: Items,
    count: Array,
    *,
    masking: Masking,
    blocks: Blocks,
    layer: Array | int = 0,
    table: Array | None = None,
    slopes: Array | None = None,
    phi: Array | None = None,
    cores: int = 1,
    cost: pl.CostEstimate | None = None,
    vmem_bytes: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array | None]:
    """Attention of every tile to the keys of its items.

    Args:
        q: `[tiles, kv_heads, rows, head_dim]`.
        arrays: keys and values as `blocks` reads them.
        items: the work; `count` of them are real, `int32[]`.
        masking, blocks: static.
        layer, table: for `blocks`.
        slopes, phi: float32 `[kv_heads, rows, 1]`, if `masking` asks for them.
        cores: tensor cores that share the items half and half; each must have tiles of its own.
        vmem_bytes: limit of on-chip memory.

    Returns:
        `[tiles * splits, kv_heads, rows, value_dim]` in q's dtype, undefined for tiles without an
        item; and the log-sum-exp, float32 `[tiles * splits, kv_heads, rows, 128]`, the same in all
        lanes, or None.
    """
    steps = items.tile.shape[0] // cores
    scalars = (
        jnp.stack(items),
        jnp.asarray(count, jnp.int32).reshape(1),
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.zeros((1, 1), jnp.int32) if table is None else table,
    )
    call = pl.pallas_call(
        functools.partial(_kernel, masking, blocks, len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=_in_specs(q, masking, arrays, steps),
            out_specs=_out_specs(q, masking, blocks, steps),
            scratch_shapes=_scratch(masking, blocks),
        ),
        out_shape=_out_shapes(q, masking, blocks),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="stream_attention",
    )
    given = [array for array in (slopes, phi) if array is not None]
    out = call(*scalars, q, *given, *arrays)
    return (out[0], out[1]) if masking.return_lse else (out[0], None)


def _tile(steps: int, core: Any, step: Any, items: Any, count: Any) -> Any:
    last = jnp.maximum(count[0] - 1, 0)
    return items[Items._fields.index("tile"), jnp.minimum(core * steps + step, last)]


def _in_specs(q: Array, masking: Masking, arrays: Sequence[Array], steps: int) -> list[Any]:
    def at(core: Any, step: Any, items: Any, count: Any, *_: Any) -> Any:
        return _tile(steps, core, step, items, count) // masking.splits, 0, 0, 0

    per_row = pl.BlockSpec((q.shape[1], masking.rows, 1), lambda *_: (0, 0, 0))
    return (
        [pl.BlockSpec((1, *q.shape[1:]), at)]
        + [per_row] * (masking.alibi + (masking.unified is not None))
        + [pl.BlockSpec(memory_space=pl.ANY)] * len(arrays)
    )


def _out_specs(q: Array, masking: Masking, blocks: Blocks, steps: int) -> list[Any]:
    def at(core: Any, step: Any, items: Any, count: Any, *_: Any) -> Any:
        return _tile(steps, core, step, items, count), 0, 0, 0

    widths = [blocks.value_dim] + [LANES] * masking.return_lse
    return [pl.BlockSpec((1, *q.shape[1:3], width), at) for width in widths]


def _out_shapes(q: Array, masking: Masking, blocks: Blocks) -> list[Any]:
    lead = (q.shape[0] * masking.splits, *q.shape[1:3])
    shapes = [jax.ShapeDtypeStruct((*lead, blocks.value_dim), q.dtype)]
    return shapes + [jax.ShapeDtypeStruct((*lead, LANES), jnp.float32)] * masking.return_lse


def _scratch(masking: Masking, blocks: Blocks) -> list[Any]:
    buffers = [pltpu.VMEM((2, *shape), dtype) for shape, dtype in blocks.buffers()]
    rows = (blocks.kv_heads, masking.rows)
    state = [pltpu.VMEM((*rows, width), jnp.float32) for width in (LANES, LANES, blocks.value_dim)]
    again = state if masking.unified is not None else []
    return [*buffers, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32), *state, *again]


def _named(masking: Masking, blocks: Blocks, count: int, refs: Sequence[Any]) -> References:
    left = iter(refs)
    one = lambda there=True: next(left) if there else None  # noqa: E731
    several = lambda number: [next(left) for _ in range(number)]  # noqa: E731
    unified = masking.unified is not None
    return References(
        items=one(),
        count=one(),
        layer=one(),
        table=one(),
        q=one(),
        slopes=one(masking.alibi),
        phi=one(unified),
        arrays=several(count),
        out=one(),
        lse=one(masking.return_lse),
        buffers=several(len(blocks.buffers())),
        semaphores=one(),
        turn=one(),
        state=State(*several(3)),
        again=State(*several(3)) if unified else None,
    )


def _kernel(masking: Masking, blocks: Blocks, arrays: int, *refs: Any) -> None:
    r = _named(masking, blocks, arrays, refs)
    core, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    item = core * steps + step
    last = jnp.minimum(r.count[0], (core + 1) * steps)

    @pl.when(item < last)
    def _():
        @pl.when(step == 0)
        def _():
            r.turn[0] = 0
            _copy(blocks, r, item, 0, 0, "start")

        @pl.when(_field(r, "opens", item) == 1)
        def _():
            _reset(r.state, r.phi)

        _run(masking, blocks, r, item, last)
        if r.again is not None:
            _fall_back(masking, blocks, r, item)

        @pl.when(_field(r, "closes", item) == 1)
        def _():
            _write(masking, r)


def _field(r: References, name: str, item: Any) -> Any:
    return r.items[Items._fields.index(name), item]


def _block(r: References, item: Any, turn: Any) -> Any:
    """Number of the block that an item reads in its turn: the sinks' first."""
    sinks = _field(r, "sink_blocks", item)
    return jnp.where(turn < sinks, turn, _field(r, "first", item) + turn - sinks)


def _copy(blocks: Blocks, r: References, item: Any, turn: Any, slot: Any, what: str) -> None:
    """Start, or wait for, the copy of an item's block into a buffer."""
    place = Place(
        r.table,
        r.layer[0],
        _field(r, "sequence", item),
        _field(r, "length", item),
        _block(r, item, turn),
    )

    def copy(source: Any, destination: Any) -> None:
        getattr(pltpu.make_async_copy(source, destination, r.semaphores.at[slot]), what)()

    blocks.visit(copy, r.arrays, [buffer.at[slot] for buffer in r.buffers], place)


def _run(masking: Masking, blocks: Blocks, r: References, item: Any, last: Any) -> None:
    count = _field(r, "blocks", item)

    def body(turn: Any, slot: Any) -> Any:
        more = turn + 1 < count

        @pl.when(more | (item + 1 < last))
        def _():
            following, its_turn = jnp.where(more, item, item + 1), jnp.where(more, turn + 1, 0)
            _copy(blocks, r, following, its_turn, 1 - slot, "start")

        _copy(blocks, r, item, turn, slot, "wait")
        _attend(masking, blocks, r, item, turn, slot, r.state, masking.unified is None)
        return 1 - slot

    r.turn[0] = jax.lax.fori_loop(0, count, body, r.turn[0])


def _attend(
    masking: Masking,
    blocks: Blocks,
    r: References,
    item: Any,
    turn: Any,
    slot: Any,
    state: State,
    online: bool,
) -> None:
    """Add one block of keys to the state of every row."""
    block = _block(r, item, turn)
    buffers = [buffer.at[slot] for buffer in r.buffers]
    valid = _field(r, "length", item) - block * blocks.keys

    @pl.when(valid < blocks.keys)
    def _():
        blocks.clean(buffers, valid)

    visible, distance = _visible(masking, blocks, r, item, block)
    for head in range(blocks.kv_heads):
        scores = masking.scale * blocks.scores(r.q[0, head], buffers, head)
        if r.slopes is not None:
            scores = scores - r.slopes[head] * distance.astype(jnp.float32)
        if masking.soft_cap is not None:
            scores = masking.soft_cap * jnp.tanh(scores / masking.soft_cap)
        scores = jnp.where(visible, scores, -jnp.inf)
        before = state.peak[head]
        if online:
            peak = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            keep = jnp.exp(before - peak)
            state.peak[head] = peak
            state.total[head] = state.total[head] * keep
            state.values[head] = state.values[head] * keep[:, :1]
        else:
            peak = before
        weights = jnp.exp(scores - peak[:, :1])
        state.total[head] += jnp.sum(weights, axis=1, keepdims=True)
        state.values[head] += blocks.values(weights, buffers, head)


def _mine(masking: Masking, r: References, item: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Token of each row in the flat order, and whether it is the item's."""
    first = _field(r, "tile", item) // masking.splits * masking.tokens
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    token = first + row // masking.group
    mine = (token >= _field(r, "begin", item)) & (token < _field(r, "end", item))
    return token, mine & (row < masking.tokens * masking.group)


def _visible(
    masking: Masking, blocks: Blocks, r: References, item: Any, block: Any
) -> tuple[Array, Array]:
    """What each row may see of a block, and the distances: `[rows, keys]`."""
    shape = (masking.rows, blocks.keys)
    length = _field(r, "length", item)
    token, visible = _mine(masking, r, item, shape)
    position = token + _field(r, "shift", item)
    slot = block * blocks.keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    visible = visible & (slot < length)
    key = slot
    if masking.ring is not None:
        newest = _field(r, "end", item) + _field(r, "shift", item) - 1
        behind = newest % masking.ring - slot
        key = newest - jnp.where(behind < 0, behind + masking.ring, behind)
    distance = position - key
    if masking.causal:
        visible = visible & (distance >= 0)
    if masking.window is not None:
        near = distance < masking.window
        visible = visible & (near | (key < masking.sinks) if masking.sinks else near)
    return visible, distance


def _reset(state: State, peak: Any) -> None:
    lowest = jnp.full(state.peak.shape, LOWEST, jnp.float32)
    state.peak[...] = lowest if peak is None else jnp.broadcast_to(peak[...], state.peak.shape)
    state.total[...] = jnp.zeros_like(state.total)
    state.values[...] = jnp.zeros_like(state.values)


def _fall_back(masking: Masking, blocks: Blocks, r: References, item: Any) -> None:
    """Once more with the running maximum if a row of the item left the range; only the rows that
    did take what comes of it.
    """
    assert masking.unified is not None
    state, again = r.state, r.again
    assert again is not None
    low, high = (jnp.exp(jnp.float32(bound)) for bound in masking.unified)
    token, mine = _mine(masking, r, item, (masking.rows, LANES))
    mine = mine & (token + _field(r, "shift", item) >= 0)
    good = (state.total[...] >= low) & (state.total[...] <= high)  # false for NaN
    out_of_range = jnp.where(mine[None] & ~good, 1.0, 0.0)

    @pl.when(jnp.max(out_of_range) > 0)
    def _():
        _reset(again, None)

        def body(turn: Any, _: Any) -> Any:
            free = 1 - r.turn[0]  # the other buffer has the next item's first block on its way
            _copy(blocks, r, item, turn, free, "start")
            _copy(blocks, r, item, turn, free, "wait")
            _attend(masking, blocks, r, item, turn, free, again, True)
            return 0

        jax.lax.fori_loop(0, _field(r, "blocks", item), body, 0)
        chosen = out_of_range > 0
        for now, then in zip(state, again, strict=True):
            now[...] = jnp.where(chosen[..., :1], then[...], now[...])


def _write(masking: Masking, r: References) -> None:
    total = r.state.total[...]
    seen = ~(total <= 0)  # a NaN is seen, and stays one
    safe = jnp.where(seen, total, 1.0)
    r.out[0] = (r.state.values[...] / safe[..., :1]).astype(r.out.dtype)
    if r.lse is not None:
        r.lse[0] = jnp.where(seen, r.state.peak[...] + jnp.log(safe), -jnp.inf)
