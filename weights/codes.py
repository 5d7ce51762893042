"""What formats of packed codes share: `[K, N]` codes as 32-bit words, or one an element.

The layout of the words is that of `kernels_pallas.quantized_matmul.packing`: the same on a disk and
on every device. `K` rows are inputs of the matrix, `N` columns its outputs; more axes may stand in
front.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas.quantized_matmul import packed_rows, tile_rows, unpack
from kernels_pallas.quantized_matmul.packing import PLANES, WORD_ROWS

Array = jax.Array
WORDS, ELEMENTS = "words", "elements"


def elements(codes: Array, form: str, bits: int, rows: int) -> Array:
    """Codes one an element, `[..., rows, N]`, whatever form they are stored in."""
    return unpack(codes, bits, rows) if form == WORDS else codes


def code_rows(codes: Array, form: str, bits: int, ids: Array) -> Array:
    """The rows `uint8[..., N]` of `codes` at `ids int[...]`, without unpacking the others."""
    if form == ELEMENTS:
        return jnp.take(codes, ids, axis=0, mode="clip")
    tile = tile_rows(bits)
    per_tile = tile * bits // 32
    number, within = ids // tile, ids % tile
    found, first, below = jnp.uint32(0), 0, 0
    for width in PLANES[bits]:
        sub_tile, row = within // (256 // width), within % (256 // width)
        word = first + sub_tile * WORD_ROWS + row % 16 // 2
        place = (width * (row // 16) + 16 * (row % 2)).astype(jnp.uint32)
        words = jnp.take(codes, number * per_tile + word, axis=0, mode="clip")
        found = found | ((words >> place[..., None]) & (2**width - 1)) << below
        first, below = first + tile * width // 32, below + width
    return jnp.asarray(found).astype(jnp.uint8)


def word_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of the words of a matrix of codes; rows that fill up the last tile count."""
    return 4 * packed_rows(rows, bits) * columns


def group_size(group: int, rows: int) -> int:
    """Rows of a group: `group` itself, or all for -1. `ValueError` unless it divides the rows."""
    if group == -1:
        return rows
    if group < 1 or rows % group:
        raise ValueError(
            f"group={group} does not divide the {rows} inputs of this matrix; nearest that do: "
            f"{near_divisors(group, rows)} (-1 is one group of all)"
        )
    return group


def near_divisors(wanted: int, number: int) -> str:
    """The divisors of `number` next below and above `wanted`, for an error message."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d <= wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return ", ".join(map(str, below + above))


def matrix_axes(spec: PartitionSpec) -> tuple[Any, Any]:
    """The entries of a matrix's spec, `(inputs, outputs)`, those left out included."""
    entries = (*spec, None, None)
    return entries[0], entries[1]


def group_spec(spec: PartitionSpec, groups: int) -> PartitionSpec:
    """The spec of `[groups, N]` values; a single group is every device's."""
    inputs, outputs = matrix_axes(spec)
    return PartitionSpec(inputs if groups > 1 else None, outputs)


def split_rows(form: str, bits: int, group: int, rows: int) -> int:
    """Rows that must stay on one device: whole groups (if there are several), whole tiles of
    words.
    """
    tile = tile_rows(bits) if form == WORDS else 1
    return math.lcm(tile, group if group < rows else 1)


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree (abstract ones too)."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


class InGroups(abc.ABC):
    """What a format of codes in groups of inputs answers by its sizes alone. It has the fields
    `codes`, `bits`, `group`, `shape`, `form` and `stored`, and multiplies in `_product`.
    """

    codes: Array
    bits: int
    group: int
    shape: tuple[int, int]
    form: str
    stored: int | None

    @abc.abstractmethod
    def _product(self, x: Array, transposed: bool = False) -> Array: ...

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`, accumulated in float32."""
        return self._product(x)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrix."""
        return self._product(x, transposed=True)

    @property
    def groups(self) -> int:
        """Groups of an output."""
        return self.shape[0] // self.group

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        return self.matrices * math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """Of a stack; 1 of a single one."""
        return math.prod(self.codes.shape[:-2])

    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return array_bytes(self) if self.stored is None else self.stored * self.matrices

    def nominal_bits(self) -> float:
        """Bits of a code."""
        return float(self.bits)

    def split_units(self) -> tuple[int, int]:
        """Rows and columns that must stay on one device."""
        return split_rows(self.form, self.bits, self.group, self.shape[0]), 1

    @property
    def separable(self) -> tuple[bool, bool]:
        """Rows are on their own, inputs if there are several groups."""
        return True, self.groups > 1


def check_by_group(shape: tuple[int, int], group: int, **parts: Any) -> None:
    """Raise `ValueError` naming the first part that has not a value a group and output of a matrix
    `shape`; None is left out.
    """
    rows, columns = shape
    for name, part in parts.items():
        if part is not None and part.shape != (rows // group, columns):
            raise ValueError(
                f"{name} has shape {tuple(part.shape)}; a matrix [{rows}, {columns}] in groups of "
                f"{group} takes {(rows // group, columns)}"
            )
