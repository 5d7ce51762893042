"""8-bit codes as the operand of a Hopper tensor core, in registers, and its result turned back.

For integers the tensor cores read both operands along the rows that are summed over, and a matrix
`int8[K, N]` lies the other way. So a warpgroup takes the transposed matrix as the operand in
registers, and turns it there: an instruction that loads and transposes tiles of 16-bit numbers
brings a thread the bytes of two neighbouring columns, and a permutation of bytes parts them. That
is 3 instructions for every 16 bytes of a thread, and no two rows of a tile lie in the same banks.

A thread's two columns are neighbours then, where the instruction has them 8 apart; `paired` names
the columns of the result as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array

COLUMNS = 64
"""Of a tile: what one warpgroup multiplies."""
DEPTH = 128
"""Rows of a tile."""


def place(thread: Any) -> Any:
    """Where, in `int8[DEPTH, 2 * COLUMNS]` as copied with a swizzle of 128 bytes, the 16 bytes are
    that a thread names to the transposing load: of one row, the columns of its warp.

    Of the four tiles of 8 rows that one load takes, the first two make rows 0 to 15 of the operand
    and the last two rows 16 to 31; each has two of the four rows that each thread holds.
    """
    lane, chunk = thread & 31, (thread >> 5) & 7
    tile, row = lane >> 3, lane & 7
    holder, one = row >> 1, row & 1
    pair = (tile & 1) ^ (holder >> 1)  # rows that differ modulo 8 lie in different banks
    k = ((tile >> 1) << 4) + (holder << 2) + (pair << 1) + one
    return (k << 7) + ((chunk ^ (k & 7)) << 4)


def selector(thread: Any, upper: int) -> Any:
    """Which of the 8 bytes of two tiles are the lower or upper column of a thread, rows in order,
    as `prmt` takes it.
    """
    return ((thread >> 1) & 1) * 0x4444 ^ (0x7531 if upper else 0x6420)


class Word:
    """A 32-bit value of each thread of a kernel, with Python's operators."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _with(self, operation: str, other: Any) -> Word:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        word = ir.IntegerType.get_signless(32)
        if not isinstance(other, Word):
            signed = int(other) - 2**32 if other >= 2**31 else int(other)
            other = Word(arith.constant(word, ir.IntegerAttr.get(word, signed)))
        return Word(getattr(arith, operation)(self.value, other.value))

    def __and__(self, other: Any) -> Word:
        return self._with("andi", other)

    def __xor__(self, other: Any) -> Word:
        return self._with("xori", other)

    def __or__(self, other: Any) -> Word:
        return self._with("ori", other)

    def __add__(self, other: Any) -> Word:
        return self._with("addi", other)

    def __mul__(self, other: Any) -> Word:
        return self._with("muli", other)

    def __lshift__(self, other: Any) -> Word:
        return self._with("shli", other)

    def __rshift__(self, other: Any) -> Word:
        return self._with("shrui", other)


def operand(emit: Any, depth: int, stored: Any, transforms: tuple[Any, ...] = ()) -> Array:
    """The tile `int8[COLUMNS, depth]`, transposed, of what a thread makes of shared memory.

    emit: function of the thread and of `stored` in the compiler that gives a thread's registers:
        for each 16 rows, that of its lower and that of its upper column.
    transforms: of `stored`.
    """
    tile = plgpu.ShapeDtypeStruct((COLUMNS, depth), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    def run(context: Any, view: Any) -> Any:
        del context
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        made = emit(Word(mgpu.utils.thread_idx()), view)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        kind = mgpu.WGMMA_LAYOUT_8BIT
        registers = np.empty(kind.registers_shape((COLUMNS, depth)), dtype=object)
        for at in np.ndindex(registers.shape):
            word = made[at[1]][at[4]].value
            registers[at] = vector.bitcast(four, vector.broadcast(one, word))
        return mgpu.FragmentedArray(_registers=registers, _layout=kind, _is_signed=True)

    inlined = plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms),), return_type=tile)
    return inlined(run)(stored)


def turned(thread: Word, stored: Any) -> list[list[Word]]:
    """What `operand` takes, of bytes `int8[DEPTH, 2 * COLUMNS]` in shared memory."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    first = Word(llvm.ptrtoint(word, utils.memref_ptr(stored))) + place(thread)
    selectors = [selector(thread, upper) for upper in range(2)]
    loaded = llvm.StructType.get_literal([word] * 4)
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    made = []
    for k in range(0, DEPTH, 32):
        address = (first + k * 2 * COLUMNS).value
        found: Any = llvm.inline_asm(
            loaded, [address], text, "=r,=r,=r,=r,r", has_side_effects=True, asm_dialect=0
        )
        tiles = [llvm.extractvalue(word, found, [i]) for i in range(4)]
        made += [
            [Word(utils.prmt(a, b, chosen.value)) for chosen in selectors]
            for a, b in (tiles[:2], tiles[2:])
        ]
    return made


def layout() -> Any:
    """Layout of `paired`: as that of a product, but a thread's two columns are neighbours."""
    from jax.experimental.mosaic.gpu.fragmented_array import Tiling

    tiling = Tiling(((COLUMNS, 8), (16, 8), (2, 2), (2, 1)))
    where = {"warp_dims": (-8,), "lane_dims": (-6, -5), "vector_dim": -2}
    return plgpu.Layout.TILED(tiling, **where)


def paired(total: Array) -> Array:
    """A product `int32[COLUMNS, M]` with the columns that its operand really had."""
    named = plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=layout())

    def run(context: Any, product: Any) -> Any:
        del context
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir.dialects import vector

        given, kind = product.registers, layout().to_mgpu()
        registers = np.empty(kind.registers_shape(total.shape), dtype=object)
        for at in np.ndindex(registers.shape):
            pair = [
                vector.extract(given[0, at[1], 0, 0, upper].item(), [], [at[7]])
                for upper in range(2)
            ]
            registers[at] = vector.from_elements(given.flat[0].type, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=kind, _is_signed=True)

    inlined = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=named)
    return inlined(run)(total)


def write_transposed(values: Array, stored: Any) -> None:
    """Values of `layout` into shared memory `[pieces, M, 128 bytes of columns]` whose rows lie
    swizzled.
    """

    def run(context: Any, values: Any, view: Any) -> None:
        del context
        values.store_tiled(_tiled_transposed(view), swizzle=128)

    kinds = (layout(), plgpu.RefType((plgpu.SwizzleTransform(128),)))
    plgpu.inline_mgpu(arg_types=kinds)(run)(values, stored)


def read_transposed(stored: Any) -> Array:
    """What `write_transposed` writes."""
    (_, rows, _), dtype = stored.shape, stored.dtype

    def run(context: Any, view: Any) -> Any:
        del context
        from jax.experimental.mosaic import gpu as mgpu

        load: Any = mgpu.FragmentedArray.load_tiled
        turned, kind = _tiled_transposed(view), layout().to_mgpu()
        return load(turned, swizzle=128, is_signed=None, layout=kind)

    named = plgpu.ShapeDtypeStruct((COLUMNS, rows), dtype, layout=layout())
    kinds = (plgpu.RefType((plgpu.SwizzleTransform(128),)),)
    return plgpu.inline_mgpu(arg_types=kinds, return_type=named)(run)(stored)


def _tiled_transposed(view: Any) -> Any:
    """Pieces of rows in tiles of 8 rows, transposed."""
    from jax.experimental.mosaic import gpu as mgpu

    return mgpu.memref_transpose(mgpu.memref_unfold(view, 1, (None, 8)), (0, 1, 3, 2))
