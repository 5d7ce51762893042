"""Codes that stand for the entries of a table: NF4, FP4, palettes, any type of few bits.

    W[k, n] = scale[g, n] * table[select[g, n], code[k, n]] + offset[g, n],   g = k // group

`weights.normal_float` and `weights.float4` make it with published tables.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas.quantized_matmul import pack, quantized_matmul
from weights import codes as code_forms
from weights.grid import nearest_codes
from weights.second_order import double as double_quantize
from weights.second_order import slot_specs, values_of

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "table", "select", "scale", "offset"],
    meta_fields=["bits", "group", "shape", "form", "stored"],
)
@dataclass(frozen=True)
class Lut(code_forms.InGroups):
    """A matrix `[K, N]` of codes of table entries.

    codes: `uint32[packed_rows(K, bits), N]`, the stored form "words"; or "elements", uint8[K, N].
    table: float32[tables, 2**bits].
    select: uint8[K / group, N], the table of each group; None where there is one table.
    scale: `[K / group, N]` or a `SecondOrder`. offset: the same, or None.
    bits, group, shape: of a code; inputs of a group; `(K, N)`.
    form, stored: how the codes lie; bytes of one matrix in its stored form, where this is another.
    """

    codes: Array
    table: Array
    select: Array | None
    scale: Any
    offset: Any
    bits: int
    group: int
    shape: tuple[int, int]
    form: str = code_forms.WORDS
    stored: int | None = None

    def _product(self, x: Array, transposed: bool = False) -> Array:
        """A bfloat16 input multiplies a table in bfloat16."""
        return quantized_matmul(
            x,
            self.codes,
            values_of(self.scale),
            bits=self.bits,
            group=self.group,
            table=self.table[0] if self.select is None else self.table,
            select=self.select,
            offsets=values_of(self.offset),
            transposed=transposed,
            rows=self.shape[0] if transposed else None,
        )

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        codes = code_forms.code_rows(self.codes, self.form, self.bits, ids).astype(jnp.int32)
        g = jnp.clip(ids // self.group, 0, self.groups - 1)
        which = 0 if self.select is None else jnp.take(self.select, g, axis=0).astype(jnp.int32)
        rows = self.table.astype(jnp.float32)[which, codes]
        rows = rows * jnp.take(values_of(self.scale), g, axis=0).astype(jnp.float32)
        if self.offset is not None:
            rows = rows + jnp.take(values_of(self.offset), g, axis=0).astype(jnp.float32)
        known = (ids >= 0) & (ids < self.shape[0])
        return jnp.where(known[..., None], rows, 0.0)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        codes = code_forms.elements(self.codes, self.form, self.bits, self.shape[0])
        place = codes.astype(jnp.int32)
        if self.select is not None:
            tables = jnp.repeat(self.select.astype(jnp.int32), self.group, axis=-2)
            place = place + tables * 2**self.bits
        entries = self.table.astype(jnp.float32).reshape(*self.table.shape[:-2], -1)
        flat = place.reshape(*place.shape[:-2], -1)
        values = jnp.take_along_axis(entries, flat, axis=-1)
        values = values.reshape(*codes.shape[:-2], self.groups, self.group, self.shape[1])
        values = values * values_of(self.scale).astype(jnp.float32)[..., None, :]
        if self.offset is not None:
            values = values + values_of(self.offset).astype(jnp.float32)[..., None, :]
        return values.reshape(codes.shape).astype(dtype)

    def prepare(self, backend: str) -> Lut:
        """Scales and offsets spread out; on a CPU codes one an element."""
        stored = self.nbytes() // self.matrices
        scale, offset = values_of(self.scale), values_of(self.offset)
        ready = dataclasses.replace(self, scale=scale, offset=offset, stored=stored)
        if backend != "cpu":
            return ready
        codes = code_forms.elements(self.codes, self.form, self.bits, self.shape[0])
        return dataclasses.replace(ready, codes=codes, form=code_forms.ELEMENTS)

    def specs(self, spec: PartitionSpec) -> Lut:
        """Codes, scales, offsets and select are split as the matrix; tables are everywhere."""
        by_group = code_forms.group_spec(spec, self.groups)
        return dataclasses.replace(
            self,
            codes=PartitionSpec(*code_forms.matrix_axes(spec)),
            table=PartitionSpec(),
            select=None if self.select is None else by_group,
            scale=slot_specs(self.scale, by_group),
            offset=slot_specs(self.offset, by_group),
        )


def from_codes(
    codes: Array,
    table: Array,
    scale: Any,
    *,
    group: int = -1,
    select: Array | None = None,
    offset: Any = None,
) -> Lut:
    """The format of codes `[K, N]` that were found elsewhere.

    Args:
        codes: places in the table.
        table: `[entries]`, or `[tables, entries]` with `select`; 2 to 256 entries, filled up with
            zeros to a power of two.
        scale: `[K / group, N]` or a `SecondOrder`.
        group: inputs that share a scale; -1 is all.
        select: `[K / group, N]`, the table of each group.
        offset: `[K / group, N]`, a `SecondOrder`, or None.
    """
    rows, columns = codes.shape
    group = code_forms.group_size(group, rows)
    table = jnp.atleast_2d(jnp.asarray(table, jnp.float32))
    entries = table.shape[1]
    if not 2 <= entries <= 256 or (len(table) > 1) != (select is not None):
        raise ValueError(
            f"table has shape {table.shape}; expected 2 to 256 entries, and several tables only "
            "with select"
        )
    bits = (entries - 1).bit_length()
    table = jnp.pad(table, ((0, 0), (0, 2**bits - entries)))
    code_forms.check_by_group((rows, columns), group, scale=scale, select=select, offset=offset)
    select = None if select is None else select.astype(jnp.uint8)
    return Lut(pack(codes, bits), table, select, scale, offset, bits, group, (rows, columns))


def codes_of(weight: Lut) -> Array:
    """The codes `uint8[..., K, N]`, whatever form they lie in."""
    codes = code_forms.elements(weight.codes, weight.form, weight.bits, weight.shape[0])
    return codes.astype(jnp.uint8)


def quantize(w: Array, table: Array, block: int = 64, *, double: bool = False) -> Lut:
    """Round `w [K, N]`, divided by the largest absolute value of each block of `block` inputs, to
    the nearest entries of a `table [entries]` (in the middle of two, the smaller).

    `double`: code the blocks' scales again (`second_order.double`).
    """
    order = jnp.argsort(jnp.asarray(table))
    return scaled(
        w,
        table,
        lambda values: order[nearest_codes(values, jnp.asarray(table)[order])],
        block,
        double,
    )


def scaled(w: Array, table: Array, encode: Any, block: int, double: bool) -> Lut:
    """Codes `encode(w / absmax)` of each block, with a table of what they stand for."""
    group = code_forms.group_size(block, w.shape[0])
    by_group = w.astype(jnp.float32).reshape(-1, group, w.shape[1])
    most = jnp.max(jnp.abs(by_group), axis=1)
    codes = encode(by_group * (1 / jnp.where(most == 0, 1.0, most))[:, None]).reshape(w.shape)
    scale = double_quantize(most) if double else most
    return from_codes(codes, table, scale, group=group)
