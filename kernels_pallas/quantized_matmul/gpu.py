"""The quantized product for few rows of input on a Hopper GPU: packed codes stream from memory and
become the transposed operand of the tensor cores in registers.

    y^T[n, m] = sum_g scale[g, n] * ((tile_g^T x_g^T)[n, m] - zero[g, n] * sum_g[m])

The columns of the matrix lie on the 64 rows of an instruction, so that few rows of input, filled up
to a multiple of 8, fill the other side. A thread block takes 128 columns and a part of the rows;
one warpgroup copies words, input, scales and zeros into a ring of slots, two decode, multiply and
scale. The parts are added up afterwards. For many rows of input the matrix is better written out
once, which is what `api.py` leaves to XLA.

A step of 256 rows of 4-bit codes is 16 KiB of words; 5 or 6 of them in flight on each of 132
processors are what the memory's latency asks for at 4.8 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.gpu_topology import GPUS
from kernels_pallas.quantized_matmul.gpu_decode import COLUMNS, decode, simulated, table_pairs
from kernels_pallas.quantized_matmul.operand import Operand
from kernels_pallas.quantized_matmul.packing import packed_rows
from kernels_pallas.quantized_matmul.tpu_decode import decoded

Array = jax.Array

WARPGROUPS = 2
"""That multiply, 64 columns each."""
WIDTH = WARPGROUPS * COLUMNS
"""Columns of a thread block."""
STEP_ROWS = 256
"""Rows of codes of a step: a whole tile of any width."""
MOST_ROWS = 128
"""Rows of input up to which the kernel serves."""
BLOCK_ROWS = 64
"""Most rows of input of a thread block."""
MOST_SLOTS = 6


@dataclass(frozen=True)
class Call:
    """Static arguments of the kernel.

    bits, table: of the codes, and whether they are looked up.
    group: rows of a part of a step that has scales of its own.
    steps_of_group: steps that share a row of scales; 1 where a step has rows of its own.
    rows: of input of a thread block.
    slots: steps in flight. steps: of a column. splits: parts that they are cut into.
    zeros: whether there are; else `center` is subtracted from every code.
    simulate: run in the simulator on a CPU.
    """

    bits: int
    table: bool
    group: int
    steps_of_group: int
    rows: int
    slots: int
    steps: int
    splits: int
    zeros: bool
    center: int
    simulate: bool

    @property
    def parts(self) -> int:
        """Of a step, by group."""
        return STEP_ROWS // self.group

    @property
    def sums(self) -> int:
        """Sums of a part: those of the rows of input, filled up to what a copy takes."""
        return -(-self.rows // 32) * 32

    @property
    def words(self) -> int:
        """Rows of words of a step."""
        return packed_rows(STEP_ROWS, self.bits)


def unsupported(x: Array, w: Operand) -> str | None:
    """Why the kernel does not take these arguments; None if it does."""
    if x.dtype != jnp.bfloat16:
        return f"the input is {x.dtype}; the GPU kernel takes bfloat16"
    if w.select is not None or (w.table is not None and w.table.shape[0] > 16):
        return "the GPU kernel takes one table of up to 16 entries"
    if x.shape[0] == 0 or w.columns % 8:
        return f"the GPU kernel takes columns in eights; there are {w.columns}"
    if w.groups > 1 and (w.group % 16 or (w.group % STEP_ROWS and STEP_ROWS % w.group)):
        return f"groups of {w.group} rows are no part or multiple of {STEP_ROWS}"
    return None


def matmul(
    x: Array,
    w: Operand,
    *,
    device: str = "h100",
    dtype: Any = jnp.float32,
    splits: int | None = None,
    simulate: bool = False,
) -> Array:
    """`[M, rows] -> dtype[M, N]`, M up to `MOST_ROWS`; see `reference.matmul`.

    Args:
        x: as `unsupported` allows.
        w: packed.
        device: a name in `gpu_topology.GPUS`.
        dtype: of the result.
        splits: parts of the rows; None fills the device.
        simulate: run in the simulator on a CPU, which knows whole steps and thread blocks only.
    """
    m, steps = x.shape[0], -(-w.rows // STEP_ROWS)
    rows = min(BLOCK_ROWS, -(-m // 8) * 8)
    blocks = -(-m // rows) * -(-w.columns // WIDTH)
    group = min(w.group, STEP_ROWS) if w.groups > 1 else STEP_ROWS
    call = Call(
        bits=w.bits,
        table=w.table is not None,
        group=group,
        steps_of_group=steps if w.groups == 1 else max(w.group // STEP_ROWS, 1),
        rows=rows,
        slots=slots_for(w, rows, group, GPUS[device].shared_bytes),
        steps=steps,
        splits=splits or splits_for(blocks, steps, GPUS[device].processors),
        zeros=w.zeros is not None,
        center=w.center,
        simulate=simulate,
    )
    padded = jnp.pad(x, ((0, -m % rows), (0, steps * STEP_ROWS - w.rows)))
    sums = jnp.sum(padded.reshape(len(padded), -1, group), axis=-1, dtype=jnp.float32).T
    sums = jnp.pad(sums, ((0, 0), (0, call.sums - rows)))
    rest = [array.astype(jnp.float32) for array in (w.scales, w.zeros) if array is not None]
    rest += [] if w.table is None else [table_pairs(w.table)]
    y = jnp.sum(_launch(call, w.codes, padded, sums, *rest), axis=0).T[:m]
    if w.offsets is not None:
        sums = jnp.sum(x.reshape(m, w.groups, w.group), axis=-1, dtype=jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        y = y + jnp.dot(sums, w.offsets.astype(jnp.float32), precision=exact)
    return y.astype(dtype)


def splits_for(blocks: int, steps: int, processors: int) -> int:
    """Parts of the rows that leave the fewest processors idle, of at least 4 steps each; the fewer,
    the less there is to add up.
    """

    def waves(splits: int) -> float:
        return -(-blocks * splits // processors) / splits

    fits = range(1, max(steps // 4, 1) + 1)
    return min(fits, key=lambda splits: (round(waves(splits), 3), splits))


def slots_for(w: Operand, rows: int, group: int, shared_bytes: int) -> int:
    """Steps in flight: up to `MOST_SLOTS`, and what fits."""
    words = packed_rows(STEP_ROWS, w.bits) * WIDTH * 4
    step = words + rows * STEP_ROWS * 2 + STEP_ROWS // group * (2 * WIDTH + 64) * 4
    left = shared_bytes - 8192 - WIDTH * rows * 4
    return max(1, min(MOST_SLOTS, left // step))


class References(NamedTuple):
    """Arrays in memory, the result, and shared memory with its barriers."""

    codes: Any
    x: Any
    sums: Any
    scales: Any
    zeros: Any
    table: Any
    out: Any
    codes_ring: Any
    x_ring: Any
    sums_ring: Any
    scales_ring: Any
    zeros_ring: Any
    table_own: Any
    out_own: Any
    there: Any
    free: Any
    table_there: Any


def _launch(call: Call, codes: Array, x: Array, *rest: Array) -> Array:
    """The kernel: `float32[splits, N, M]`, the parts of the transposed product."""
    columns = codes.shape[1]
    optional = {"zeros": call.zeros, "zeros_ring": call.zeros}
    optional |= dict.fromkeys(("table", "table_own", "table_there"), call.table)
    per_column = plgpu.SMEM((call.slots, call.parts, WIDTH), jnp.float32)

    def body(*refs: Any) -> None:
        left = iter(refs)
        named = (next(left) if optional.get(name, True) else None for name in References._fields)
        _kernel(call, References(*named))

    options: Any = {"interpret": gpu.simulator()} if call.simulate else {}
    (found,) = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((call.splits, columns, x.shape[0]), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((call.slots, call.words, WIDTH), jnp.uint32),
            _input_tiles(call),
            plgpu.SMEM((call.slots, call.parts, call.sums), jnp.float32),
            per_column,
            *[per_column] * call.zeros,
            *[plgpu.SMEM((4**call.bits,), jnp.uint32)] * call.table,
            plgpu.SMEM((WARPGROUPS, COLUMNS, call.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=4 + call.zeros, num_barriers=call.slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.slots),
            *[plgpu.Barrier()] * call.table,
        ],
        grid=(-(-columns // WIDTH), call.splits, x.shape[0] // call.rows),
        grid_names=("column", "split", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **options,
    )(codes, x, *rest)
    return found


def _input_tiles(call: Call) -> Any:
    """Shared memory for the input, in tiles that no group ends within."""
    depth = min(call.group, 64)
    transforms = (plgpu.TilingTransform((8, depth)), plgpu.SwizzleTransform(2 * depth))
    return plgpu.SMEM((call.slots, call.rows, STEP_ROWS), jnp.bfloat16, transforms=transforms)


def _kernel(call: Call, r: References) -> None:
    column, split, row = (jax.lax.axis_index(name) for name in ("column", "split", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    start = jax.lax.div(split * call.steps, jnp.int32(call.splits))
    stop = jax.lax.div((split + 1) * call.steps, jnp.int32(call.splits))

    @pl.when(warpgroup < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        if call.table:
            plgpu.barrier_wait(r.table_there)
        mine, own = pl.ds(warpgroup * COLUMNS, COLUMNS), r.out_own.at[warpgroup]

        def step(i: Any, total: Any) -> Any:
            slot = jax.lax.rem(i - start, jnp.int32(call.slots))
            plgpu.barrier_wait(r.there.at[slot])
            for part in range(call.parts):
                total = _add_part(call, r, slot, part, mine, total)
            plgpu.barrier_arrive(r.free.at[slot])
            return total

        zero = gpu.full((COLUMNS, call.rows), 0.0, call.simulate)
        own[...] = jax.lax.fori_loop(start, stop, step, zero)
        plgpu.commit_smem()
        here = pl.ds((column * WARPGROUPS + warpgroup) * COLUMNS, COLUMNS)
        plgpu.copy_smem_to_gmem(own, r.out.at[split, here, pl.ds(row * call.rows, call.rows)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        if call.table:
            plgpu.copy_gmem_to_smem(r.table, r.table_own, r.table_there)
        _fill(call, r, column, row, start, stop)


def _add_part(call: Call, r: References, slot: Any, part: int, mine: Any, total: Any) -> Any:
    """Add the product of the rows of one group, or of the step's part of one, with its scales."""
    first, shape = part * call.group, (COLUMNS, call.rows)
    words = r.codes_ring.at[slot, :, mine]
    if call.simulate:
        known = None if r.table_own is None else r.table_own[...]
        tile = simulated(words[...], first, call.group, call.bits, known)
    else:
        tile = decode(words, first, call.group, call.bits, r.table_own)
    x = r.x_ring.at[slot, :, pl.ds(first, call.group)]
    made = gpu.product(tile, x, call.simulate, transposed=True)
    how = decoded(True, call.bits, call.table)
    scale = gpu.load(r.scales_ring.at[slot, part, mine], gpu.of_rows(), call.simulate)
    sums = r.sums_ring.at[slot, part, pl.ds(0, call.rows)]
    sums = gpu.load(sums, gpu.of_columns(), call.simulate)
    less: Any = call.center + how.factor * how.bias
    if call.zeros:
        zero = gpu.load(r.zeros_ring.at[slot, part, mine], gpu.of_rows(), call.simulate)
        less = gpu.down(zero + how.factor * how.bias, shape)
    values = made * how.factor - gpu.across(sums, shape) * less
    return total + values * gpu.down(scale, shape)


def _fill(call: Call, r: References, column: Any, row: Any, start: Any, stop: Any) -> None:
    """What each step needs, into a slot as soon as it is free."""
    here, ours = pl.ds(column * WIDTH, WIDTH), pl.ds(row * call.rows, call.rows)
    sums = pl.ds(row * call.rows, call.sums)

    def copy(i: Any, slot: Any) -> None:
        group = jax.lax.div(i, jnp.int32(call.steps_of_group)) * call.parts
        group = pl.ds(group, call.parts)
        pairs = [
            (r.codes.at[pl.ds(i * call.words, call.words), here], r.codes_ring),
            (r.x.at[ours, pl.ds(i * STEP_ROWS, STEP_ROWS)], r.x_ring),
            (r.sums.at[pl.ds(i * call.parts, call.parts), sums], r.sums_ring),
            (r.scales.at[group, here], r.scales_ring),
        ]
        if call.zeros:
            pairs.append((r.zeros.at[group, here], r.zeros_ring))
        for source, ring in pairs:
            plgpu.copy_gmem_to_smem(source, ring.at[slot], r.there.at[slot])

    @pl.loop(start, stop)
    def _step(i: Any) -> None:
        slot = jax.lax.rem(i - start, jnp.int32(call.slots))
        pl.when(i - start >= call.slots)(lambda: plgpu.barrier_wait(r.free.at[slot]))
        copy(i, slot)

    @pl.loop(jnp.maximum(stop - call.slots, start), stop)
    def _drain(i: Any) -> None:
        plgpu.barrier_wait(r.free.at[jax.lax.rem(i - start, jnp.int32(call.slots))])
