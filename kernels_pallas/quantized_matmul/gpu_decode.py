"""Words of codes to an operand of a Hopper tensor core, in registers, for the kernel of `gpu.py`.

A thread of a warpgroup holds, of the 64 columns and 16 rows of codes that one instruction takes,
two columns and the row pairs (2 q, 2 q + 1) and (2 q + 8, 2 q + 9): one place in each of the words
of word rows q and q + 4. So a thread reads just the words that it needs, neighbouring threads
neighbouring columns, and a pair of bfloat16 is a shift, a mask and an `or`, as on a TPU
(`tpu_decode.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.quantized_matmul.packing import PLANES, SLAB_ROWS, WORD_ROWS, tile_rows
from kernels_pallas.quantized_matmul.tpu_decode import MANTISSA, ONES

Array = jax.Array

COLUMNS = 64
"""Of a tile: what one warpgroup multiplies."""


class Machine(Protocol):
    """A 32-bit value of each thread of a warpgroup, and what can be done with it."""

    def both(self, value: Any, mask: int) -> Any:
        """`value & mask`."""
        ...

    def either(self, a: Any, b: Any) -> Any:
        """`a | b`."""
        ...

    def one_of(self, value: Any, bits: int) -> Any:
        """`value | bits`."""
        ...

    def shifted(self, value: Any, left: int) -> Any:
        """By `left` bits to the left, or to the right, where zeros come in."""
        ...

    def floated(self, value: Any) -> Any:
        """The bits of the float32 of a whole number."""
        ...

    def word(self, row: int, upper: int) -> Any:
        """The word of row `row + q` and the thread's lower or upper column."""
        ...

    def entry(self, code: Any) -> Any:
        """The pair of entries of a pair of codes."""
        ...


def pair(machine: Machine, bits: int, slab: int, half: int, upper: int, table: bool) -> Any:
    """The two bfloat16 of rows `16 slab + 8 half + (2 q, 2 q + 1)` and of the thread's lower or
    upper column.
    """
    if table:
        codes = _codes(machine, bits, slab, half, upper, 0)
        codes = machine.either(codes, machine.shifted(codes, bits - 16))
        return machine.entry(machine.both(codes, 4**bits - 1))
    if bits <= MANTISSA:
        codes = _codes(machine, bits, slab, half, upper, MANTISSA - bits)
        return machine.one_of(codes, ONES)
    codes = _codes(machine, bits, slab, half, upper, 0)
    low = machine.floated(machine.both(codes, 0xFFFF))
    high = machine.floated(machine.shifted(codes, -16))
    return machine.either(machine.shifted(low, -16), high)


def _codes(machine: Machine, bits: int, slab: int, half: int, upper: int, target: int) -> Any:
    """The codes of a pair, from bit `target` of each half of a word on."""
    made, below = None, 0
    for row, width, place in fields(bits, slab):
        words = machine.shifted(machine.word(row + 4 * half, upper), target + below - place)
        part = machine.both(words, ((2**width - 1) << (target + below)) * 0x00010001)
        made = part if made is None else machine.either(made, part)
        below += width
    return made


def fields(bits: int, slab: int) -> list[tuple[int, int, int]]:
    """`[(word row of t = 0, bits, lowest bit)]` of the parts of the codes of a slab of 16 rows,
    lowest bits of the code first.
    """
    tile = tile_rows(bits)
    number, slab = divmod(slab, tile // SLAB_ROWS)
    found, first = [], number * tile * bits // 32
    for width in PLANES[bits]:
        sub_tile, place = divmod(slab, 16 // width)
        found.append((first + sub_tile * WORD_ROWS, width, width * place))
        first += tile * width // 32
    return found


def table_pairs(table: Array) -> Array:
    """A table of up to 16 entries as pairs of bfloat16, by two codes: `uint32[entries ** 2]`."""
    bits = jax.lax.bitcast_convert_type(table.astype(jnp.bfloat16), jnp.uint16)
    entries = bits.astype(jnp.uint32)
    return (entries[None, :] | (entries[:, None] << 16)).reshape(-1)


def decode(words: Any, first: int, rows: int, bits: int, table: Any | None) -> Any:
    """The tile `bfloat16[COLUMNS, rows]`, transposed, of the codes from row `first` on of words
    `uint32[..., COLUMNS]` in shared memory; `tpu_decode.Decoded` says how it stands for values.

    table: of `table_pairs`, in shared memory.
    """
    arguments = (words,) if table is None else (words, table)
    tile = plgpu.ShapeDtypeStruct((COLUMNS, rows), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    kinds = (plgpu.RefType(),) * len(arguments)
    inlined = plgpu.inline_mgpu(arg_types=kinds, return_type=tile)
    return inlined(_emitter(first // SLAB_ROWS, rows, bits))(*arguments)


def _emitter(first: int, rows: int, bits: int) -> Callable[..., Any]:
    """What emits the instructions of `decode`."""

    def emit(context: Any, words: Any, table: Any | None = None) -> Any:
        del context
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        machine = Instructions(words, table)
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((COLUMNS, rows)), dtype=object)
        for place in np.ndindex(registers.shape):
            _, eighth, _, _, upper, *_ = place
            slab, half = divmod(eighth, 2)
            made = pair(machine, bits, first + slab, half, upper, table is not None)
            registers[place] = vector.bitcast(two, vector.broadcast(one, made))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit


def simulated(words: Array, first: int, rows: int, bits: int, table: Array | None) -> Array:
    """What `decode` makes, as `float32[COLUMNS, rows]`, in plain JAX; for the simulator."""
    machine, made = Arrays(words, table), []
    for slab in range(first // SLAB_ROWS, (first + rows) // SLAB_ROWS):
        for half in range(2):
            found = pair(machine, bits, slab, half, 0, table is not None)
            places = jnp.stack([found << 16, found & jnp.uint32(0xFFFF0000)], axis=1)
            made.append(places.reshape(WORD_ROWS, -1))
    return jax.lax.bitcast_convert_type(jnp.concatenate(made), jnp.float32).T


class Arrays:
    """A `Machine` of arrays: the four threads that share a column, for every column at once."""

    def __init__(self, words: Array, table: Array | None) -> None:
        self._words, self._table = words, table

    def both(self, value: Any, mask: int) -> Any:
        """See `Machine`."""
        return value & jnp.uint32(mask)

    def either(self, a: Any, b: Any) -> Any:
        """See `Machine`."""
        return a | b

    def one_of(self, value: Any, bits: int) -> Any:
        """See `Machine`."""
        return value | jnp.uint32(bits)

    def shifted(self, value: Any, left: int) -> Any:
        """See `Machine`."""
        return value << jnp.uint32(left) if left > 0 else value >> jnp.uint32(-left)

    def floated(self, value: Any) -> Any:
        """See `Machine`."""
        return jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)

    def word(self, row: int, upper: int) -> Any:
        """See `Machine`."""
        del upper  # all columns are here
        return self._words[row : row + 4]

    def entry(self, code: Any) -> Any:
        """See `Machine`."""
        assert self._table is not None
        return self._table[code.astype(jnp.int32)]


class Instructions:
    """A `Machine` that emits what it is told, for the thread that runs it."""

    def __init__(self, words: Any, table: Any | None) -> None:
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref

        self._ir, self._arith, self._memref = ir, arith, memref
        self._words, self._table = words, table
        self._known: dict[tuple[int, int], Any] = {}
        thread = self.both(mgpu.utils.thread_idx(), 127)
        lane = self.both(thread, 31)
        self._quarter = self.both(lane, 3)
        of_warp = self.shifted(self.shifted(thread, -5), 4)
        self._column = arith.addi(of_warp, self.shifted(lane, -2))

    def both(self, value: Any, mask: int) -> Any:
        """See `Machine`."""
        return self._arith.andi(value, self._constant(mask))

    def either(self, a: Any, b: Any) -> Any:
        """See `Machine`."""
        return self._arith.ori(a, b)

    def one_of(self, value: Any, bits: int) -> Any:
        """See `Machine`."""
        return self._arith.ori(value, self._constant(bits))

    def shifted(self, value: Any, left: int) -> Any:
        """See `Machine`."""
        if left == 0:
            return value
        shift = self._arith.shli if left > 0 else self._arith.shrui
        return shift(value, self._constant(abs(left)))

    def floated(self, value: Any) -> Any:
        """See `Machine`."""
        made = self._arith.uitofp(self._ir.F32Type.get(), value)
        return self._arith.bitcast(self._ir.IntegerType.get_signless(32), made)

    def word(self, row: int, upper: int) -> Any:
        """See `Machine`."""
        if (row, upper) not in self._known:
            place = (
                self._arith.addi(self._quarter, self._constant(row)),
                self._arith.addi(self._column, self._constant(8 * upper)),
            )
            self._known[row, upper] = self._load(self._words, *place)
        return self._known[row, upper]

    def entry(self, code: Any) -> Any:
        """See `Machine`."""
        return self._load(self._table, code)

    def _load(self, reference: Any, *place: Any) -> Any:
        index = self._ir.IndexType.get()
        return self._memref.load(reference, [self._arith.index_cast(index, part) for part in place])

    def _constant(self, value: int) -> Any:
        word = self._ir.IntegerType.get_signless(32)
        signed = value - 2**32 if value >= 2**31 else value
        return self._arith.constant(word, self._ir.IntegerAttr.get(word, signed))
