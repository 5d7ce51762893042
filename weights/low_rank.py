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
from weights.product import product

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True)
class LowRank:
    """A base `[K, N]`, an array or any format, with an adapter of rank r.

    a: [K, r]. b: [r, N]. scale: LoRA's `alpha / r`. dropout: share of the adapter's input that is
    left out where `matmul` gets a key.
    """

    base: Any
    a: Array
    b: Array
    scale: float = 1.0
    dropout: float = 0.0

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
        return (protocol.dequantize(self.base) + self.scale * added).astype(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`, of one matrix of a stack."""
        return self.a.shape[-2], self.b.shape[-1]

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        return protocol.size(self.base)

    def nbytes(self) -> int:
        """Bytes of the stored form, the adapter included."""
        return protocol.nbytes(self.base) + code_forms.array_bytes((self.a, self.b))

    def nominal_bits(self) -> float:
        """Those of the base."""
        return protocol.nominal_bits(self.base)

    def prepare(self, backend: str) -> LowRank:
        """With the base prepared."""
        return dataclasses.replace(self, base=protocol.prepare(self.base, backend))

    def split_units(self) -> tuple[int, int]:
        """Rows and columns that must stay on one device."""
        return protocol.split_units(self.base)

    def specs(self, spec: PartitionSpec) -> LowRank:
        """The rank is never split."""
        inputs, outputs = code_forms.matrix_axes(spec)
        return dataclasses.replace(
            self,
            base=protocol.specs(self.base, spec),
            a=PartitionSpec(inputs, None),
            b=PartitionSpec(None, outputs),
        )
