"""The product of rows sorted by group, each group with a matrix of its own: a mixture's experts.

The weight carries a leading axis of groups: an array `[groups, d_in, d_out]`, or a format each of
whose arrays has that axis in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import grouped_matmul as kernel
from weights.layers import matmul
from weights.protocol import is_format

Array = jax.Array

BLOCK_ROWS = 32
"""Rows that a format multiplies at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OfLayer:
    """The groups' matrices of one layer, not cut out of the stack of all layers.

    stack: array `[layers, groups, d_in, d_out]`, or a format with these axes in front.
    layer: int32[].
    """

    stack: Any
    layer: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer's first array; `[groups, d_in, d_out]` unless it is a format's."""
        return jax.tree.leaves(self.stack)[0].shape[1:]

    def cut(self) -> Any:
        """The layer's weight by itself."""
        return jax.tree.map(lambda leaf: leaf[self.layer], self.stack)


def grouped_matmul(x: Array, weight: Any, group_sizes: Array, dtype: Any = None) -> Array:
    """`[rows, d_in] -> [rows, d_out]` in `dtype` (None: `x.dtype`), each row by its group's matrix.

    Rows are sorted by group, `group_sizes int32[groups]` of each; rows after the last group give 0.
    """
    if isinstance(weight, OfLayer):
        return _of_layer(x, weight, group_sizes, dtype)
    if is_format(weight):
        return _by_blocks(x, weight, group_sizes.astype(jnp.int32)).astype(dtype or x.dtype)
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        weight = weight.astype(x.dtype)  # integers have no gradient
    return kernel(x, weight, group_sizes, dtype=dtype)


def _of_layer(x: Array, weight: OfLayer, sizes: Array, dtype: Any) -> Array:
    """On a CPU, which picks matrices one by one, all layers' groups count, the others' as empty."""

    def picked() -> Array:
        stack = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), weight.stack)
        every = jnp.zeros((jax.tree.leaves(weight.stack)[0].shape[0], *sizes.shape), sizes.dtype)
        return grouped_matmul(x, stack, every.at[weight.layer].set(sizes).reshape(-1), dtype)

    def cut() -> Array:
        return grouped_matmul(x, weight.cut(), sizes, dtype)

    return jax.lax.platform_dependent(cpu=picked, default=cut)


def _by_blocks(x: Array, weight: Any, sizes: Array) -> Array:
    """Rows laid out anew so that each block is of one group, and multiplied block by block."""
    rows, groups = x.shape[0], sizes.shape[0]
    count = min(rows // BLOCK_ROWS + groups, rows)  # no more blocks are ever begun
    needed = (sizes + BLOCK_ROWS - 1) // BLOCK_ROWS
    last = jnp.cumsum(needed)
    block = jnp.arange(count, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, block, side="right"), groups - 1)
    stops = jnp.cumsum(sizes)
    within = (block - (last - needed)[group])[:, None] * BLOCK_ROWS + jnp.arange(BLOCK_ROWS)
    own = (within < sizes[group][:, None]) & (block < last[-1])[:, None]
    source = jnp.where(own, (stops - sizes)[group][:, None] + within, rows)

    def one(piece: tuple[Array, Array]) -> Array:
        group, place = piece
        ours = jnp.take(x, place, axis=0, mode="fill", fill_value=0)
        return matmul(ours, jax.tree.map(lambda leaf: leaf[group], weight))

    made = jax.lax.map(one, (group, source))
    out = jnp.zeros((rows, made.shape[-1]), made.dtype)
    return out.at[source.reshape(-1)].set(made.reshape(-1, made.shape[-1]), mode="drop")
