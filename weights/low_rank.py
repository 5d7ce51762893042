"""Any weight plus a product of two thin matrices: LoRA's adapter beside its frozen base.

W = base + scale * a b,   a [K, r], b [r, N]
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from weights import codes as code_forms
from weights import layers, protocol
from weights.nested import OverBase
from weights.product import product

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scale"],
    meta_fields=["dropout"],
)
@dataclass(frozen=True)
class LowRank(OverBase):
    """A base `[K, N]`, an array or any format, with an adapter of rank r.

    a: [K, r]. b: [r, N]. scale: LoRA's `alpha / r`, float32[]; layers of a stack may differ in it.
    dropout: share of the adapter's input that is left out where `matmul` gets a key.
    """

    base: Any
    a: Array
    b: Array
    scale: Any = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, int | float) and hasattr(self.a, "shape"):
            scale = jnp.full(self.a.shape[:-2], self.scale, jnp.float32)
            object.__setattr__(self, "scale", scale)

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`; the two parts are added in float32."""
        ours, base_rng = x, rng
        if self.dropout > 0 and rng is not None:
            base_rng, own = jax.random.split(rng)
            kept = jax.random.bernoulli(own, 1 - self.dropout, x.shape)
            ours = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        y = layers.matmul(x, self.base, rng=base_rng, dtype=jnp.float32)
        inner = product(ours, self.a).astype(x.dtype)
        return (y + self.scale * product(inner, self.b)).astype(x.dtype)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrix."""
        inner = product(x, self.b, 1).astype(x.dtype)
        y = layers.matmul_transposed(x, self.base, jnp.float32)
        return (y + self.scale * product(inner, self.a, 1)).astype(x.dtype)

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        rows = jnp.take(self.a, ids, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        return layers.lookup(self.base, ids) + self.scale * product(rows, self.b)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        added = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        scale = self.scale[..., None, None]
        return (protocol.dequantize(self.base) + scale * added).astype(dtype)

    @property
    def separable(self) -> tuple[bool, bool]:
        """As the base, unless some of the input is left out by chance."""
        return (False, False) if self.dropout > 0 else protocol.separable(self.base)

    def specs(self, spec: PartitionSpec) -> LowRank:
        """The rank is never split."""
        inputs, outputs = code_forms.matrix_axes(spec)
        return dataclasses.replace(
            self,
            base=protocol.specs(self.base, spec),
            a=PartitionSpec(inputs, None),
            b=PartitionSpec(None, outputs),
            scale=PartitionSpec(),
        )
