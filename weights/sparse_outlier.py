"""Any weight plus few values in 16 bits where rounding hurts most (SpQR, PB-LLM, SqueezeLLM).

    W = base + S        values of S are residuals: what is missing from the base

Three storages of S: "ell", a list of equal length for each output; "csr", all values by output,
with the place where each output's begin; "dense", the matrix itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from weights import codes as code_forms
from weights import layers, protocol
from weights.nested import OverBase
from weights.product import product

Array = jax.Array
STORAGES = ("ell", "csr", "dense")
FEW = 16
"""Most rows of input that gather what they multiply; for more, S is written out once."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "values", "rows", "starts"],
    meta_fields=["storage"],
)
@dataclass(frozen=True)
class SparseOutlier(OverBase):
    """A base `[K, N]`, an array or any format, and few residuals.

    values: bfloat16 `[R, N]` ("ell"), `[nnz]` ("csr") or `[K, N]` ("dense").
    rows: the row of each value, uint16 or int32, in the shape of the values; None for "dense".
        Lists are filled up with zeros at row 0.
    starts: int32[N + 1], where the values of each output begin, for "csr".
    """

    base: Any
    values: Array
    rows: Array | None = None
    starts: Array | None = None
    storage: str = "ell"

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`; the two parts are added in float32."""
        y = layers.matmul(x, self.base, rng, jnp.float32)
        few = x.size // x.shape[-1] <= FEW
        added = self._gathered(x) if few and self.rows is not None else None
        if added is None:
            added = product(x, self.residual().astype(x.dtype))
        return (y + added).astype(x.dtype)

    def _gathered(self, x: Array) -> Array:
        """The sparse part of a product, `float32[..., N]`, value by value."""
        assert self.rows is not None
        inputs = jnp.take(x, self.rows.astype(jnp.int32), axis=-1).astype(jnp.float32)
        terms = inputs * self.values.astype(jnp.float32)
        if self.storage == "ell":
            return jnp.sum(terms, axis=-2)
        out = jnp.zeros((*x.shape[:-1], self.shape[1]), jnp.float32)
        return out.at[..., self._columns()].add(terms)

    def _columns(self) -> Array:
        """The output of each value of "csr"; N, outside, for what fills up the list."""
        assert self.starts is not None
        places = jnp.arange(self.values.shape[-1])
        return jnp.searchsorted(self.starts, places, side="right") - 1

    def residual(self) -> Array:
        """S, `float32[K, N]`."""
        values = self.values.astype(jnp.float32)
        if self.storage == "dense" or self.rows is None:
            return values
        columns = jnp.arange(self.shape[1]) if self.storage == "ell" else self._columns()
        zeros = jnp.zeros(self.shape, jnp.float32)
        return zeros.at[self.rows.astype(jnp.int32), columns].add(values)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrix."""
        y = layers.matmul_transposed(x, self.base, jnp.float32)
        return (y + product(x, self.residual().astype(x.dtype), 1)).astype(x.dtype)

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        rows = jnp.take(self.residual(), ids, axis=0, mode="fill", fill_value=0)
        return layers.lookup(self.base, ids) + rows

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        residual = SparseOutlier.residual
        for _ in range(self.values.ndim - (1 if self.storage == "csr" else 2)):
            residual = jax.vmap(residual)
        return (protocol.dequantize(self.base) + residual(self)).astype(dtype)

    def specs(self, spec: PartitionSpec) -> SparseOutlier:
        """The base as the matrix; lists by output, "csr" everywhere."""
        inputs, outputs = code_forms.matrix_axes(spec)
        by_output = PartitionSpec(inputs if self.storage == "dense" else None, outputs)
        values = PartitionSpec() if self.storage == "csr" else by_output
        return dataclasses.replace(
            self,
            base=protocol.specs(self.base, spec),
            values=values,
            rows=None if self.rows is None else values,
            starts=None if self.starts is None else PartitionSpec(),
        )

    def aligned(self, layers: Sequence[SparseOutlier]) -> list[SparseOutlier]:
        """The same layers with lists of one length, those of the longest."""
        if any(layer.storage != self.storage for layer in layers) or self.storage == "dense":
            return list(layers)
        longest = max(layer.values.shape[0] for layer in layers)
        return [_filled(layer, longest) for layer in layers]


def from_residual(
    base: Any, residual: Array, storage: str = "ell", dtype: Any = jnp.bfloat16
) -> SparseOutlier:
    """A base with the values of `residual [K, N]` that are not 0; concrete arrays only."""
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r} is not one of {', '.join(STORAGES)}")
    if tuple(residual.shape) != tuple(base.shape[-2:]):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; the base is {list(base.shape[-2:])}"
        )
    if storage == "dense":
        return SparseOutlier(base, jnp.asarray(residual, dtype), storage=storage)
    dense = np.asarray(residual)
    columns, rows = np.nonzero(dense.T)
    index = np.uint16 if dense.shape[0] <= 2**16 else np.int32
    counts = np.bincount(columns, minlength=dense.shape[1])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = dense[rows, columns]
    if storage == "csr":
        kept = jnp.asarray(values, dtype), jnp.asarray(rows.astype(index)), jnp.asarray(starts)
        return SparseOutlier(base, *kept, storage)
    place = np.arange(len(rows)) - starts[columns]
    shape = (int(counts.max(initial=1)), dense.shape[1])
    listed, where = np.zeros(shape, np.float32), np.zeros(shape, index)
    listed[place, columns], where[place, columns] = values, rows
    return SparseOutlier(base, jnp.asarray(listed, dtype), jnp.asarray(where), storage=storage)


def _filled(layer: SparseOutlier, length: int) -> SparseOutlier:
    """With zeros at row 0 behind, up to `length`."""
    assert layer.rows is not None
    missing = [(0, length - layer.values.shape[0])] + [(0, 0)] * (layer.values.ndim - 1)
    return dataclasses.replace(
        layer, values=jnp.pad(layer.values, missing), rows=jnp.pad(layer.rows, missing)
    )
