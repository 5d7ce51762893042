"""The product with bit planes on a Hopper GPU: planes become 8-bit codes in registers, the operand
of one exact product (`int8_matmul/gpu_product.py`).

Tensor cores that multiply single bits exist, but no kernel of Pallas reaches them; so few planes
save memory and bandwidth and no operations. A thread of a warpgroup takes, of a tile of 256 rows
and of each plane, the words of two rows and two neighbouring columns, once. A shift of a word
leaves one bit in each of its bytes: four codes are a shift, a mask and an `or` for each plane, and
they are one register of the operand, if the columns of `x` are put in that order, which is the
TPU kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.bit_planes.tpu import BYTES, TILE, WORDS, by_bytes, byte_values
from kernels_pallas.int8_matmul.gpu_operand import COLUMNS, Word, operand
from kernels_pallas.int8_matmul.gpu_product import WIDTH, product

Array = jax.Array


def unsupported(x: Array, planes: Array) -> str | None:
    """Why the kernel does not take these arguments; None if it does."""
    if x.size == 0 or planes.size == 0:
        return "the product is empty"
    if planes.shape[2] % 4:
        return f"the GPU kernel takes columns in fours; there are {planes.shape[2]}"
    return None


def matmul(
    x: Array,
    planes: Array,
    coding: str,
    *,
    device: str = "h100",
    splits: int | None = None,
    simulate: bool = False,
) -> Array:
    """`int8[M, rows] x planes -> int32[M, N]`; see `reference.matmul`, and `gpu_product.product`
    for the rest.
    """
    bits, words, columns = planes.shape
    turned, factor, offset = byte_values(bits, coding)
    x = jnp.pad(x, ((0, 0), (0, words // WORDS * TILE - x.shape[1])))
    given = (Planes(bits, turned), planes, columns, by_bytes(x))
    total = product(*given, device=device, splits=splits, simulate=simulate)
    return factor * total + offset * jnp.sum(x.astype(jnp.int32), axis=1, keepdims=True)


@dataclass(frozen=True)
class Planes:
    """A matrix of codes in planes `uint32[bits, K / 32, N]`.

    turned: whether the top bit of a code is turned over.
    """

    bits: int
    turned: bool

    @property
    def rows(self) -> int:
        """See `gpu_product.Codes`."""
        return TILE

    @property
    def slot_bytes(self) -> int:
        """See `gpu_product.Codes`."""
        return 4 * self.bits * WORDS * WIDTH

    def ring(self, slots: int) -> Any:
        """See `gpu_product.Codes`."""
        return plgpu.SMEM((slots, self.bits, WORDS, WIDTH), jnp.uint32)

    def source(self, stored: Any, step: Any, columns: Any) -> Any:
        """See `gpu_product.Codes`."""
        return stored.at[:, pl.ds(step * WORDS, WORDS), columns]

    def tile(self, slot: Any, warpgroup: Any, simulate: bool) -> Array:
        """See `gpu_product.Codes`."""
        if simulate:
            return simulated(slot[:, :, pl.ds(warpgroup * COLUMNS, COLUMNS)], self.turned)
        return operand(self._registers, TILE, slot)

    def _registers(self, thread: Word, stored: Any) -> list[list[Word]]:
        """Those of a thread; see `place`."""
        words = [
            [self._words(stored, place(thread, half), plane) for plane in range(self.bits)]
            for half in range(2)
        ]
        return [
            [four_codes([pair[upper] for pair in words[half]], shift) for upper in range(2)]
            for shift in range(8)
            for half in range(2)
        ]

    def _words(self, stored: Any, where: Word, plane: int) -> list[Word]:
        """Of a plane, those of two neighbouring columns."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm, vector

        word = ir.IntegerType.get_signless(32)
        first = Word(llvm.ptrtoint(word, utils.memref_ptr(stored)))
        address = first + where + 4 * plane * WORDS * WIDTH
        pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address.value)
        pair = llvm.load(ir.VectorType.get((2,), word), pointer)
        found = [Word(vector.extract(pair, [], [column])) for column in range(2)]
        top = self.turned and plane == self.bits - 1
        return [part ^ 0xFFFFFFFF for part in found] if top else found


def place(thread: Any, half: int) -> Any:
    """Where in the words `uint32[WORDS, WIDTH]` of a plane those of a thread's two columns are, in
    bytes: of the row that makes its rows of the lower or upper 16 of each 32 of the operand.
    """
    lane, warp = thread & 31, (thread >> 5) & 7
    row, column = (lane & 3) + 4 * half, (warp << 4) + ((lane >> 2) << 1)
    return row * (4 * WIDTH) + (column << 2)


def four_codes(planes: list[Any], shift: int) -> Any:
    """The codes of bits `shift`, `shift + 8`, .. of the words of every plane, one a byte."""
    made = None
    for bit, plane in enumerate(planes):
        moved = plane << (bit - shift) if bit > shift else plane >> (shift - bit)
        part = moved & np.uint32(BYTES << bit)
        made = part if made is None else made | part
    return made


def simulated(planes: Array, turned: bool) -> Array:
    """The tile that `Planes.tile` makes of words `uint32[bits, WORDS, COLUMNS]`, in plain JAX."""
    bit = jnp.arange(len(planes), dtype=jnp.uint32).reshape(-1, 1, 1, 1, 1)
    place = jnp.arange(8, dtype=jnp.uint32)[:, None, None] + 8 * jnp.arange(4, dtype=jnp.uint32)
    ones = (planes[:, None, :, None] >> place[..., None]) & 1  # bit, shift, word row, byte
    codes = jnp.sum(ones << bit, axis=0) ^ (turned << (len(planes) - 1))
    return codes.reshape(TILE, -1).astype(jnp.uint8).astype(jnp.int8).T
