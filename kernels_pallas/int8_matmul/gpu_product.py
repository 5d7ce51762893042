"""The exact product of 8-bit integers on a Hopper GPU, for any form that the codes have in memory.

    y^T[n, m] = scale[n] * x_scale[m] * sum_k w[k, n] x[m, k] + bias[n] + addend[m, n]

The columns of the matrix lie on the 64 rows of an instruction and are made in registers
(`gpu_operand.py`); up to 256 rows of input fill the other side. A thread block takes 128 columns;
one warpgroup copies codes and input into a ring of slots, two multiply, into sums of 32 bits, and
write what a row and a column are scaled to. Where columns and rows make too few thread blocks for
the device, each takes a part of the sum, and the parts are added up afterwards as integers.

A step of 128 rows and 256 rows of input copies 48 KiB for 8.4 million operations: 60 % of the peak
asks the second-level cache for 7 TB/s, and few rows ask the memory for all that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.gpu_topology import GPUS, Gpu
from kernels_pallas.int8_matmul.gpu_operand import (
    COLUMNS,
    DEPTH,
    layout,
    paired,
    read_transposed,
    write_transposed,
)
from kernels_pallas.int8_matmul.reference import scaled

Array = jax.Array

WARPGROUPS = 2
"""That multiply, 64 columns each."""
WIDTH = WARPGROUPS * COLUMNS
"""Columns of a thread block."""
OUT_ROWS = 64
"""Most rows of the result that are written at a time."""
MOST_SLOTS = 6
TILES = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(DEPTH))
"""How shared memory holds input for an instruction: its rows of 128 bytes lie swizzled."""
BAND = 16
"""Thread blocks of rows that go through all columns together: 16 MiB of input of 4096 features."""
FEWEST_STEPS = 4
"""Steps that a part of a sum has at least."""


class Codes(Protocol):
    """How the matrix lies in memory."""

    @property
    def rows(self) -> int:
        """Of a step; a multiple of `DEPTH`."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Of shared memory, of a step."""
        ...

    def ring(self, slots: int) -> Any:
        """Shared memory for steps."""
        ...

    def source(self, stored: Any, step: Any, columns: Any) -> Any:
        """The part of the matrix in memory that a step copies."""
        ...

    def tile(self, slot: Any, warpgroup: Any, simulate: bool) -> Array:
        """`int8[COLUMNS, rows]`, the transposed part of a step that a warpgroup multiplies."""
        ...


@dataclass(frozen=True)
class Call:
    """Static arguments of the kernel.

    codes: the form of the matrix. m, columns: of the result. rows: of input of a thread block.
    slots: steps in flight. steps: of a column. splits: parts that they are cut into. dtype: of the
    result. scaled, bias, addend: what is done to the sums. simulate: run in the simulator.
    """

    codes: Codes
    m: int
    columns: int
    rows: int
    slots: int
    steps: int
    splits: int
    dtype: Any
    scaled: bool
    bias: bool
    addend: bool
    simulate: bool

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Parts of the sum, bands of rows, columns, and rows of a band: the last run first, so that
        the input of a band is in the cache for all columns.
        """
        rows = -(-self.m // self.rows)
        bands = -(-rows // BAND)
        return self.splits, bands, -(-self.columns // WIDTH), -(-rows // bands)

    @property
    def ends(self) -> tuple[int, int]:
        """Rows and columns that are missing to whole thread blocks."""
        _, bands, columns, rows = self.grid
        return bands * rows * self.rows - self.m, columns * WIDTH - self.columns

    @property
    def out_rows(self) -> int:
        """Rows of the result that are written at a time."""
        return min(self.rows, OUT_ROWS)

    @property
    def out_columns(self) -> int:
        """Columns of the result in a row of shared memory, of 128 bytes."""
        return 128 // jnp.dtype(self.dtype).itemsize


def product(
    codes: Codes,
    stored: Array,
    columns: int,
    x: Array,
    x_scales: Array | None = None,
    scales: Array | None = None,
    bias: Array | None = None,
    addend: Array | None = None,
    *,
    dtype: Any = jnp.int32,
    device: str = "h100",
    splits: int | None = None,
    simulate: bool = False,
) -> Array:
    """`int8[M, K] x codes -> dtype[M, columns]`; without scales the sums, `int32`.

    Args:
        codes: how `stored` holds `[K, columns]`; columns in sixteens.
        x: M and K at least 1.
        x_scales, scales: `float32[M]` and `[columns]`, both or neither.
        bias, addend: `[columns]` and `[M, columns]`, added to the scaled sums.
        dtype: of the result.
        device: a name in `gpu_topology.GPUS`.
        splits: parts of the sum; None fills the device.
        simulate: run in the simulator on a CPU, which knows whole steps and thread blocks only.
    """
    (m, depth), there = x.shape, GPUS[device]
    rows, steps = block_rows(m), -(-depth // codes.rows)
    blocks = -(-m // rows) * -(-columns // WIDTH)
    splits = splits or splits_for(blocks, steps, there.processors)
    whole = splits == 1 and scales is not None
    kind = dtype if whole else jnp.int32
    size = jnp.dtype(kind).itemsize
    call = Call(
        codes=codes,
        m=m,
        columns=columns,
        rows=rows,
        slots=slots_for(codes, rows, size, there),
        steps=steps,
        splits=splits,
        dtype=kind,
        scaled=whole,
        bias=whole and bias is not None,
        addend=whole and addend is not None,
        simulate=simulate,
    )
    x = jnp.pad(x, ((0, call.ends[0] if simulate else -m % 8), (0, -depth % codes.rows)))
    found = _launch(call, x, stored, x_scales, scales, bias, addend)[:, :m]
    if whole:
        return found[0]
    total = found[0] if splits == 1 else jnp.sum(found, axis=0)
    if scales is None:
        return total
    assert x_scales is not None
    return scaled(total, x_scales, scales, dtype, bias, addend)


def block_rows(m: int) -> int:
    """Rows of input of a thread block: the fewest that an instruction takes and that suffice."""
    return next((rows for rows in (8, 16, 24, 32, 48, 64, 128, 192) if m <= rows), 256)


def splits_for(blocks: int, steps: int, processors: int) -> int:
    """Parts of the sum that all run at once, of at least `FEWEST_STEPS` steps each."""
    return max(1, min(processors // blocks, steps // FEWEST_STEPS))


def slots_for(codes: Codes, rows: int, out_bytes: int, device: Gpu) -> int:
    """Steps in flight: up to `MOST_SLOTS`, and what fits."""
    step = codes.slot_bytes + rows * codes.rows
    left = device.shared_bytes - 2048 - WIDTH * min(rows, OUT_ROWS) * out_bytes
    return max(1, min(MOST_SLOTS, left // step))


class References(NamedTuple):
    """Arrays in memory, the result, and shared memory with its barriers."""

    x: Any
    stored: Any
    x_scales: Any
    scales: Any
    bias: Any
    addend: Any
    out: Any
    x_ring: Any
    ring: Any
    own: Any
    there: Any
    free: Any
    added: Any


def _launch(call: Call, x: Array, stored: Array, *rest: Array | None) -> Array:
    """The kernel: `[splits, M, columns]`."""
    used = (call.scaled, call.scaled, call.bias, call.addend)
    names = ("x_scales", "scales", "bias", "addend", "added")
    optional: dict[str, bool] = dict(zip(names, (*used, call.addend), strict=True))
    given = [_padded(call, *pair) for pair in zip(names, rest, strict=False) if optional[pair[0]]]

    def body(*refs: Any) -> None:
        left = iter(refs)
        named = (next(left) if optional.get(name, True) else None for name in References._fields)
        _kernel(call, References(*named))

    shape = (call.m, call.columns)
    if call.simulate:
        shape = (call.m + call.ends[0], call.columns + call.ends[1])
        stored = jnp.pad(stored, ((0, 0),) * (stored.ndim - 1) + ((0, call.ends[1]),))
    own = (WARPGROUPS, COLUMNS // call.out_columns, call.out_rows, call.out_columns)
    options: Any = {"interpret": gpu.simulator()} if call.simulate else {}
    (found,) = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((call.splits, *shape), call.dtype)],
        scratch_types=[
            plgpu.SMEM((call.slots, call.rows, call.codes.rows), jnp.int8, transforms=TILES),
            call.codes.ring(call.slots),
            plgpu.SMEM(own, call.dtype, transforms=TILES[1:]),
            plgpu.Barrier(num_arrivals=2, num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.slots),
            *[plgpu.Barrier(num_arrivals=own[1], num_barriers=WARPGROUPS)] * call.addend,
        ],
        grid=call.grid,
        grid_names=("split", "band", "column", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **options,
    )(x, stored, *given)
    return found[..., : call.columns]


def _padded(call: Call, name: str, array: Array | None) -> Array:
    """Scales and bias for whole thread blocks; an addend as it is, but in the simulator."""
    assert array is not None
    if name != "addend":
        end = call.ends[0 if name == "x_scales" else 1]
        return jnp.pad(array.astype(jnp.float32), (0, end))
    ends = call.ends if call.simulate else (0, 0)
    return jnp.pad(array.astype(call.dtype), [(0, end) for end in ends])


def _kernel(call: Call, r: References) -> None:
    split, band, column, row = map(jax.lax.axis_index, ("split", "band", "column", "row"))
    row = band * call.grid[3] + row
    warpgroup = jax.lax.axis_index("warpgroup")
    start = jax.lax.div(split * call.steps, jnp.int32(call.splits))
    stop = jax.lax.div((split + 1) * call.steps, jnp.int32(call.splits))

    @pl.when(warpgroup < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        total = _sum(call, r, warpgroup, start, stop)
        _write(call, r, row, column, split, warpgroup, total)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _fill(call, r, row, column, start, stop)


def _sum(call: Call, r: References, warpgroup: Any, start: Any, stop: Any) -> Array:
    """`int32[COLUMNS, rows]`, over the steps of a part."""

    def step(i: Any, total: Array) -> Array:
        slot = jax.lax.rem(i - start, jnp.int32(call.slots))
        plgpu.barrier_wait(r.there.at[slot])
        tile = call.codes.tile(r.ring.at[slot], warpgroup, call.simulate)
        total = _add_product(total, tile, r.x_ring.at[slot], call.simulate)
        plgpu.barrier_arrive(r.free.at[slot])
        return total

    zero = jnp.zeros((COLUMNS, call.rows), jnp.int32)
    if not call.simulate:
        zero = plgpu.layout_cast(zero, gpu.matrix())
    return jax.lax.fori_loop(start, stop, step, zero)


def _add_product(total: Array, tile: Array, x: Any, simulate: bool) -> Array:
    """`total + tile x^T`."""
    if simulate:
        return total + jnp.dot(tile.astype(jnp.int32), x[...].T.astype(jnp.int32))

    def run(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, tile, gpu.transposed_reference(x))

    summed: Any = pl.run_state(run)(plgpu.ACC.init(total))
    return summed


def _write(
    call: Call, r: References, row: Any, column: Any, split: Any, warpgroup: Any, total: Array
) -> None:
    """Scale the sums and write them, some rows at a time."""
    first, own = (column * WARPGROUPS + warpgroup) * COLUMNS, r.own.at[warpgroup]
    total = total if call.simulate else paired(total)
    for start in range(0, call.rows, call.out_rows):
        ours = pl.ds(row * call.rows + start, call.out_rows)
        pieces = [
            (own.at[i], ours, pl.ds(first + i * call.out_columns, call.out_columns))
            for i in range(COLUMNS // call.out_columns)
        ]
        values: Any = total[:, start : start + call.out_rows]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if call.scaled:
            values = _scaled(call, r, values, ours, pl.ds(first, COLUMNS))
        if call.addend:
            barrier = r.added.at[warpgroup]
            for mine, *here in pieces:
                plgpu.copy_gmem_to_smem(r.addend.at[*here], mine, barrier)
            plgpu.barrier_wait(barrier)
            values = values + _read(own, call.simulate)
        _put(own, values.astype(call.dtype), call.simulate)
        plgpu.commit_smem()
        for mine, *here in pieces:
            plgpu.copy_smem_to_gmem(mine, r.out.at[split, *here])
    plgpu.wait_smem_to_gmem(0)


def _put(own: Any, values: Array, simulate: bool) -> None:
    if not simulate:
        return write_transposed(values, own)
    own[...] = values.reshape(own.shape[0], own.shape[2], -1).swapaxes(1, 2)
    return None


def _read(own: Any, simulate: bool) -> Array:
    if not simulate:
        return read_transposed(own).astype(jnp.float32)
    return own[...].swapaxes(1, 2).reshape(COLUMNS, -1).astype(jnp.float32)


def _scaled(call: Call, r: References, values: Array, ours: Any, here: Any) -> Array:
    shape = values.shape
    down = lambda ref: _spread(ref.at[here], shape, 0, call.simulate)  # noqa: E731
    values = values.astype(jnp.float32) * _spread(r.x_scales.at[ours], shape, 1, call.simulate)
    values = values * down(r.scales)
    return values + down(r.bias) if call.bias else values


def _spread(ref: Any, shape: tuple[int, ...], axis: int, simulate: bool) -> Array:
    """One number a column (axis 0) or a row of input (axis 1), over the other axis."""
    kind = None if simulate else layout()
    found = gpu.load(ref, None if kind is None else kind.reduce(1 - axis), simulate)
    spread = jax.lax.broadcast_in_dim(found, shape, [axis])
    return spread if kind is None else plgpu.layout_cast(spread, kind)


def _fill(call: Call, r: References, row: Any, column: Any, start: Any, stop: Any) -> None:
    """What each step needs, into a slot as soon as it is free."""
    ours, here = pl.ds(row * call.rows, call.rows), pl.ds(column * WIDTH, WIDTH)

    @pl.loop(start, stop)
    def _step(i: Any) -> None:
        slot = jax.lax.rem(i - start, jnp.int32(call.slots))
        pl.when(i - start >= call.slots)(lambda: plgpu.barrier_wait(r.free.at[slot]))
        x = r.x.at[ours, pl.ds(i * call.codes.rows, call.codes.rows)]
        plgpu.copy_gmem_to_smem(x, r.x_ring.at[slot], r.there.at[slot])
        stored = call.codes.source(r.stored, i, here)
        plgpu.copy_gmem_to_smem(stored, r.ring.at[slot], r.there.at[slot])

    @pl.loop(jnp.maximum(stop - call.slots, start), stop)
    def _drain(i: Any) -> None:
        plgpu.barrier_wait(r.free.at[jax.lax.rem(i - start, jnp.int32(call.slots))])
