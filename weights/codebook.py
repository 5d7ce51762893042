"""Additive codebooks: each small tile of the matrix is a sum of entries of M tables (AQLM).

W[tile j, n] = scale[n] * sum_m tables[m, codes[j, n, m]]
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from weights import codes as code_forms
from weights.product import product

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "tables", "scale", "dense"],
    meta_fields=["stored"],
)
@dataclass(frozen=True)
class Codebook:
    """A matrix `[K, N]` in tiles of `in_group` inputs and `out_group` outputs.

    codes: uint8 or uint16 `[K / in_group, N / out_group, M]`.
    tables: `[M, entries, in_group, out_group]`. scale: `[N]`.
    dense: bfloat16[K, N], the prepared form, which is what is multiplied; None in the stored one.
    stored: bytes of one matrix in its stored form, where there is a prepared one.
    """

    codes: Array
    tables: Array
    scale: Array
    dense: Array | None = None
    stored: int | None = None

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`, accumulated in float32."""
        return product(x, self._matrix(x.dtype)).astype(x.dtype)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrix."""
        return product(x, self._matrix(x.dtype), 1).astype(x.dtype)

    def _matrix(self, dtype: Any) -> Array:
        return self.dequantize(dtype) if self.dense is None else self.dense.astype(dtype)

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        in_group = self.tables.shape[-2]
        tiles = jnp.take(self.codes, ids // in_group, axis=0, mode="clip")
        rows = self._entries(tiles)  # [..., N / out_group, in_group, out_group]
        within = (ids % in_group)[..., None, None, None]
        rows = jnp.take_along_axis(rows, within, axis=-2).reshape(*ids.shape, -1)
        known = (ids >= 0) & (ids < self.shape[0])
        return jnp.where(known[..., None], rows * self.scale.astype(jnp.float32), 0.0)

    def _entries(self, codes: Array) -> Array:
        """The sums `float32[..., in_group, out_group]` that codes `[..., M]` stand for."""
        total = jnp.float32(0)
        for number in range(self.tables.shape[-4]):
            entries = self.tables[number].astype(jnp.float32)
            total = total + entries[codes[..., number].astype(jnp.int32)]
        return jnp.asarray(total)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        if self.codes.ndim > 3:
            return jax.vmap(lambda one: one.dequantize(dtype))(self)
        tiles = self._entries(self.codes).swapaxes(1, 2)
        return (tiles.reshape(self.shape) * self.scale.astype(jnp.float32)).astype(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`, of one matrix of a stack."""
        in_group, out_group = self.tables.shape[-2:]
        return self.codes.shape[-3] * in_group, self.codes.shape[-2] * out_group

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        return math.prod(self.codes.shape[:-3]) * math.prod(self.shape)

    def nbytes(self) -> int:
        """Bytes of the stored form, tables included."""
        if self.stored is not None:
            return self.stored * math.prod(self.codes.shape[:-3])
        return code_forms.array_bytes(self)

    def nominal_bits(self) -> float:
        """Bits of the codes of a tile, by its values."""
        books, entries, *tile = self.tables.shape[-4:]
        return books * math.log2(entries) / math.prod(tile)

    def prepare(self, backend: str) -> Codebook:
        """With the matrix in bfloat16: there is no product of codes yet that is faster."""
        if self.dense is not None:
            return self
        stored = self.nbytes() // math.prod(self.codes.shape[:-3])
        return dataclasses.replace(self, dense=self.dequantize(jnp.bfloat16), stored=stored)

    def split_units(self) -> tuple[int, int]:
        """Rows and columns that must stay on one device: those of a tile."""
        return self.tables.shape[-2], self.tables.shape[-1]

    def specs(self, spec: PartitionSpec) -> Codebook:
        """Codes as the matrix, tables everywhere, scales by output."""
        inputs, outputs = code_forms.matrix_axes(spec)
        return dataclasses.replace(
            self,
            codes=PartitionSpec(inputs, outputs, None),
            tables=PartitionSpec(),
            scale=PartitionSpec(outputs),
            dense=None if self.dense is None else PartitionSpec(inputs, outputs),
        )


def make(codes: Array, tables: Array, scale: Array) -> Codebook:
    """The checked format; `ValueError` names what does not fit."""
    entries, out_group = tables.shape[1], tables.shape[3]
    if codes.shape[-1] != tables.shape[0] or scale.shape != (codes.shape[1] * out_group,):
        raise ValueError(
            f"codes {codes.shape}, tables {tables.shape} and scale {scale.shape} do not fit: "
            "[K / in_group, N / out_group, M], [M, entries, in_group, out_group] and [N]"
        )
    return Codebook(codes.astype(jnp.uint8 if entries <= 256 else jnp.uint16), tables, scale)
