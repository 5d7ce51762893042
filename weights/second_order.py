"""Scales or zeros that are coded once more: double quantization (QLoRA), second-level statistics
(SpQR), zeros as whole numbers of a few bits (GPTQ's files).

    value = scale[b] * (table[code] or code - zero[b]) + offset,   b = place // group

What is coded is an array `[G, N]`, laid in one sequence and cut into blocks of `group`. A
`SecondOrder` stands wherever a format holds `scale`, `zero` or `offset`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kernels_pallas.quantized_matmul import pack, unpack
from weights import codes as code_forms
from weights.grid import Grid, encode, fit_minmax, nearest_codes

Array = jax.Array
ORDERS = ("columns", "rows")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "scale", "zero", "offset", "table"],
    meta_fields=["bits", "group", "shape", "order"],
)
@dataclass(frozen=True)
class SecondOrder:
    """An array `[G, N]` in codes.

    q: uint32 words of the sequence of codes.
    scale, zero: float32[blocks], None for 1 and 0.
    offset: float32[], added to all; None is 0.
    table: float32[2**bits], what a code stands for; None: itself.
    order: "columns" lays column after column (bitsandbytes' order of blocks), "rows" row after row.
    """

    q: Array
    scale: Array | None
    zero: Array | None
    offset: Array | None
    table: Array | None
    bits: int
    group: int
    shape: tuple[int, int]
    order: str = "columns"

    def materialise(self) -> Array:
        """`float32[..., G, N]`; axes in front of `q` stay there."""
        lead, size = self.q.shape[:-1], math.prod(self.shape)
        codes = unpack(self.q[..., None], self.bits, size)[..., 0]
        if self.table is None:
            values = codes.astype(jnp.float32)
        else:
            values = jnp.take_along_axis(self.table, codes.astype(jnp.int32), axis=-1)
        if self.zero is not None:
            values = values - self._spread(self.zero)
        if self.scale is not None:
            values = values * self._spread(self.scale)
        if self.offset is not None:
            values = values + self.offset[..., None]
        groups, columns = self.shape
        if self.order == "rows":
            return values.reshape(*lead, groups, columns)
        return values.reshape(*lead, columns, groups).swapaxes(-1, -2)

    def _spread(self, by_block: Array) -> Array:
        spread = jnp.repeat(by_block.astype(jnp.float32), self.group, axis=-1)
        return spread[..., : math.prod(self.shape)]

    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return code_forms.array_bytes(self)

    def specs(self, spec: PartitionSpec) -> SecondOrder:
        """Whole on every device: blocks run across the columns, and it is small."""
        return jax.tree.map(lambda _: PartitionSpec(), self)


def from_codes(
    codes: Array,
    shape: tuple[int, int],
    *,
    bits: int,
    group: int,
    order: str = "columns",
    **parts: Any,
) -> SecondOrder:
    """The format of codes `[G N]`, in their sequence, that were found elsewhere; `parts` are those
    of `scale`, `zero`, `offset` and `table` that there are.
    """
    return _packed(codes, shape, bits, group, order, **parts)


def codes_of(part: SecondOrder) -> Array:
    """The codes `uint8[G N]`, in their sequence."""
    return unpack(part.q[..., None], part.bits, math.prod(part.shape))[..., 0].astype(jnp.uint8)


def values_of(part: Any) -> Any:
    """The array that stands in a slot of scales or zeros: itself, or what is coded; None stays."""
    return part.materialise() if isinstance(part, SecondOrder) else part


def slot_specs(part: Any, spec: PartitionSpec) -> Any:
    """The specs of a slot of scales or zeros, given that of its array."""
    if part is None:
        return None
    return part.specs(spec) if isinstance(part, SecondOrder) else spec


def quantize(
    values: Array,
    bits: int = 3,
    group: int = 16,
    *,
    order: str = "columns",
    grid: Grid | None = None,
) -> SecondOrder:
    """`[G, N]` values on a uniform grid with a scale and zero for each block of `group`.

    `grid` None: asymmetric, from the smallest to the largest of a block, the zero not rounded
    (SpQR's second level).
    """
    grid = grid or Grid(bits, include_zero=False, whole_zero=False)
    blocks = _blocks(values, group, order)
    scale, zero = fit_minmax(blocks.T, grid)
    codes = encode(blocks.T, scale, zero, grid).T
    return _packed(codes, values.shape, grid.bits, group, order, scale=scale, zero=zero)


def double(values: Array, group: int = 256, *, order: str = "columns") -> SecondOrder:
    """Double quantization of `[G, N]` block scales (QLoRA, arXiv 2305.14314, as bitsandbytes does
    it): less their mean, in the signed 8-bit dynamic map, with a largest value for each block.
    """
    offset = jnp.mean(values.astype(jnp.float32))
    blocks = _blocks(values.astype(jnp.float32) - offset, group, order, fill=0.0)
    most = jnp.max(jnp.abs(blocks), axis=1)
    table = jnp.asarray(dynamic_map())
    codes = nearest_codes(blocks / jnp.where(most == 0, 1.0, most)[:, None], table)
    parts = {"scale": most, "offset": offset, "table": table}
    return _packed(codes, values.shape, 8, group, order, **parts)


def whole(values: Array, bits: int, *, order: str = "columns") -> SecondOrder:
    """`[G, N]` whole numbers 0 .. 2**bits - 1, packed; others lose their higher bits."""
    count = math.prod(values.shape)
    codes = _blocks(values, count, order)
    return _packed(codes, values.shape, bits, count, order)


def dynamic_map() -> np.ndarray:
    """The 256 values of the signed 8-bit dynamic data type, `float32`, sorted (arXiv 2110.02861, as
    in bitsandbytes, to the bit): for each of 7 decades, twice as many values as for the one below.
    """
    found = [np.asarray([0.0, 1.0], np.float32)]
    for i in range(7):
        edges = _linspace(2**i)
        values = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [values, -values]
    return np.sort(np.concatenate(found))


def _linspace(parts: int) -> np.ndarray:
    """The ends of equal parts of 0.1 .. 1, `float32`, rounded as torch does: from both ends, the
    product and the sum at once.
    """
    first, last, place = np.float32(0.1), np.float32(1), np.arange(parts + 1)
    step = np.float64((last - first) / np.float32(parts))
    up, down = first + step * place, last - step * (parts - place)
    return np.where(place < (parts + 1) // 2, up, down).astype(np.float32)


def _blocks(values: Array, group: int, order: str, fill: float | None = None) -> Array:
    """The sequence of `[G, N]` values as `[blocks, group]`; the last is filled up, by its last
    value unless `fill` is given.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}")
    sequence = (values if order == "rows" else values.T).reshape(-1)
    missing = -len(sequence) % group
    last = sequence[-1] if fill is None else jnp.asarray(fill, sequence.dtype)
    return jnp.concatenate([sequence, jnp.full(missing, last)]).reshape(-1, group)


def _packed(
    codes: Array, shape: tuple[int, ...], bits: int, group: int, order: str, **parts: Array
) -> SecondOrder:
    sequence = codes.reshape(-1)[: math.prod(shape)]
    arrays = {"scale": None, "zero": None, "offset": None, "table": None} | parts
    words = pack(sequence[:, None], bits)[:, 0]
    groups, columns = shape
    return SecondOrder(
        words, **arrays, bits=bits, group=group, shape=(groups, columns), order=order
    )
