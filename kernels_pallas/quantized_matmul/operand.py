"""The quantized matrix as the implementations take it: arrays, and what is static about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.packing import packed_rows

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operand:
    """A matrix `W [rows, N]`, `W[k, n] = scales[g, n] * (value(codes[k, n]) - zeros[g, n]) +
    offsets[g, n]` with `g = k // group`.

    codes: words of `packing.pack`, or one whole number an element, `[rows, N]`.
    scales, zeros, offsets: `[groups, N]`. No zeros: `2 ** (bits - 1)` for unsigned codes that stand
        for themselves, else 0.
    table: what a code stands for, `[2 ** bits]`, or `[tables, 2 ** bits]` with `select`, the table
        of each group, `[groups, N]`. None: a code stands for itself.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    offsets: Array | None
    table: Array | None
    select: Array | None
    rows: int = field(metadata={"static": True})
    bits: int = field(metadata={"static": True})
    group: int = field(metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether the codes lie in words."""
        return self.codes.dtype == jnp.uint32

    @property
    def columns(self) -> int:
        """N."""
        return self.codes.shape[-1]

    @property
    def groups(self) -> int:
        """Groups of rows with a scale of their own."""
        return self.scales.shape[0]

    @property
    def center(self) -> int:
        """What is subtracted from a code where there are no zeros."""
        signed = jnp.issubdtype(self.codes.dtype, jnp.signedinteger)
        plain = self.zeros is None and self.table is None and not signed
        return 2 ** (self.bits - 1) if plain else 0


def operand(
    codes: Array,
    scales: Array,
    zeros: Array | None,
    offsets: Array | None,
    table: Array | None,
    select: Array | None,
    *,
    rows: int,
    bits: int | None,
    group: int | None,
) -> Operand:
    """The checked operand of a product with `rows` input features.

    Raises `ValueError` naming the argument, what it is and what would be right.
    """
    bits = _bits(codes, rows, bits, table)
    group = rows if group is None else group
    if group < 1 or rows % group:
        raise ValueError(f"group={group} does not divide the {rows} input features")
    columns = codes.shape[-1]
    scales = scales[None] if scales.ndim == 1 else scales
    for name, array in (
        ("scales", scales),
        ("zeros", zeros),
        ("offsets", offsets),
        ("select", select),
    ):
        if array is not None and array.shape != (rows // group, columns):
            raise ValueError(
                f"{name} has shape {array.shape}; {rows} input features in groups of {group} and "
                f"{columns} outputs take {(rows // group, columns)}"
            )
    _check_table(table, select, bits)
    return Operand(codes, scales, zeros, offsets, table, select, rows, bits, group)


def held_rows(codes: Array, bits: int) -> int:
    """Rows that stored codes stand for, those that fill the last tile of words included."""
    return codes.shape[0] * 32 // bits if codes.dtype == jnp.uint32 else codes.shape[0]


def _bits(codes: Array, rows: int, bits: int | None, table: Array | None) -> int:
    """The bits of a code, after checking that `codes` holds `rows` rows of them."""
    if codes.ndim != 2 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes are whole numbers [rows, N]; got {codes.dtype}{codes.shape}")
    if codes.dtype == jnp.uint32:
        if bits is None:
            raise ValueError("words of packed codes need bits, the bits of a code (1 to 8)")
        expected = packed_rows(rows, bits)
        if codes.shape[0] != expected:
            raise ValueError(
                f"codes has {codes.shape[0]} rows of words; {rows} input features of {bits} bits "
                f"take {expected} (packing.pack)"
            )
        return bits
    if codes.shape[0] != rows:
        raise ValueError(f"codes has {codes.shape[0]} rows; the input has {rows} features")
    if bits is None:
        bits = jnp.iinfo(codes.dtype).bits if table is None else table.shape[-1].bit_length() - 1
    return bits


def _check_table(table: Array | None, select: Array | None, bits: int) -> None:
    if table is None:
        if select is not None:
            raise ValueError("select picks a table for each group; there is no table")
        return
    if table.shape[-1] != 2**bits:
        raise ValueError(f"table has shape {table.shape}; codes of {bits} bits take {2**bits}")
    if table.ndim != (1 if select is None else 2):
        raise ValueError(
            f"table has shape {table.shape}; expected "
            + ("[entries], without select" if select is None else "[tables, entries], with select")
        )
