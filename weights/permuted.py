"""Any weight whose inputs are stored in another order: GPTQ's act-order, outliers brought together.

y = x[..., perm] base        row j of the base is the matrix's row perm[j]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from weights import layers, protocol
from weights.nested import OverBase

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "perm"], meta_fields=[])
@dataclass(frozen=True)
class Permuted(OverBase):
    """A base `[K, N]`, an array or any format, and the order of its rows.

    perm: int32[K], a permutation. Where the rows are split over a mesh, the input is gathered.
    """

    base: Any
    perm: Array

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`."""
        return layers.matmul(jnp.take(x, self.perm, axis=-1), self.base, rng=rng)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrix."""
        y = layers.matmul_transposed(x, self.base)
        return jnp.take(y, jnp.argsort(self.perm), axis=-1)

    def lookup(self, ids: Array) -> Array:
        """Rows `[..., N]`; ids outside give zeros."""
        places = jnp.take(jnp.argsort(self.perm), ids, mode="clip")
        known = (ids >= 0) & (ids < self.shape[0])
        return layers.lookup(self.base, jnp.where(known, places, self.shape[0]))

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        back = jnp.argsort(self.perm, axis=-1)[..., None]
        return jnp.take_along_axis(protocol.dequantize(self.base, dtype), back, axis=-2)

    @property
    def separable(self) -> tuple[bool, bool]:
        """Rows as of the base; inputs are put in order whole."""
        return protocol.separable(self.base)[0], False

    def specs(self, spec: PartitionSpec) -> Permuted:
        """The base as the matrix; the order is everywhere."""
        return Permuted(protocol.specs(self.base, spec), PartitionSpec())  # pyright: ignore
