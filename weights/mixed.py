"""Groups of inputs in formats of their own, as many bits as each group needs (SliM-LLM).

The parts stand one under another along the inputs, in whole groups; `order` says which group of the
matrix each stored group is.
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

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "order"], meta_fields=[])
@dataclass(frozen=True)
class Mixed:
    """A matrix `[K, N]` in parts.

    parts: weights `[K_i, N]`, arrays or any formats; each `K_i` a multiple of the group.
    order: int32[G]; stored group j is group `order[j]` of the matrix, `K / G` inputs each.
    """

    parts: tuple[Any, ...]
    order: Array

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`; the parts are added in float32."""
        by_group = x.reshape(*x.shape[:-1], self.order.shape[-1], -1)
        stored = jnp.take(by_group, self.order, axis=-2).reshape(x.shape)
        total, start = jnp.float32(0), 0
        for part in self.parts:
            stop = start + part.shape[-2]
            total = total + layers.matmul(stored[..., start:stop], part, rng, jnp.float32)
            start = stop
        return jnp.asarray(total).astype(x.dtype)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrix."""
        stored = [layers.matmul_transposed(x, part) for part in self.parts]
        return self._logical(jnp.concatenate(stored, axis=-1)[..., None])[..., 0]

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        group = self.shape[0] // self.order.shape[-1]
        places = jnp.take(jnp.argsort(self.order), ids // group, mode="clip") * group + ids % group
        known = (ids >= 0) & (ids < self.shape[0])
        total, start = jnp.float32(0), 0
        for part in self.parts:
            here = (places >= start) & (places < start + part.shape[-2]) & known
            total = total + layers.lookup(part, jnp.where(here, places - start, part.shape[-2]))
            start += part.shape[-2]
        return jnp.asarray(total)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        dense = [protocol.dequantize(part, dtype) for part in self.parts]
        return self._logical(jnp.concatenate(dense, axis=-2))

    def _logical(self, stored: Array) -> Array:
        """Stored rows `[..., K, N]` in the order of the matrix."""
        *lead, rows, columns = stored.shape
        by_group = stored.reshape(*lead, self.order.shape[-1], -1, columns)
        order = self.order.reshape(*(1,) * (len(lead) + 1 - self.order.ndim), *self.order.shape)
        back = jnp.argsort(order, axis=-1)[..., None, None]
        return jnp.take_along_axis(by_group, back, axis=-3).reshape(*lead, rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`, of one matrix of a stack."""
        return sum(part.shape[-2] for part in self.parts), self.parts[0].shape[-1]

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        return sum(map(protocol.size, self.parts))

    def nbytes(self) -> int:
        """Bytes of the stored form, all parts and the order."""
        return sum(map(protocol.nbytes, self.parts)) + code_forms.array_bytes(self.order)

    def nominal_bits(self) -> float:
        """The mean over all values."""
        bits = sum(protocol.nominal_bits(part) * protocol.size(part) for part in self.parts)
        return bits / self.size

    def prepare(self, backend: str) -> Mixed:
        """With every part prepared."""
        parts = tuple(protocol.prepare(part, backend) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    def split_units(self) -> tuple[int, int]:
        """Any number of pieces: the inputs of its parts are everywhere."""
        return 1, 1

    def specs(self, spec: PartitionSpec) -> Mixed:
        """Split along the outputs only."""
        by_column = PartitionSpec(None, code_forms.matrix_axes(spec)[1])
        parts = tuple(protocol.specs(part, by_column) for part in self.parts)
        return dataclasses.replace(self, parts=parts, order=PartitionSpec())


def join(parts: Sequence[Any], groups: Sequence[Sequence[int]]) -> Mixed:
    """Parts with the numbers of the matrix's groups that each holds, in its own order.

    Raises `ValueError` unless every group is held once and parts hold whole groups.
    """
    order = np.concatenate([np.asarray(held, np.int32) for held in groups])
    if sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(f"groups are {order.tolist()}; each of 0..{len(order) - 1} is held once")
    rows = {part.shape[-2] / max(1, len(held)) for part, held in zip(parts, groups, strict=True)}
    if len(rows) != 1:
        raise ValueError(f"parts hold {sorted(rows)} inputs a group; all groups are alike")
    return Mixed(tuple(parts), jnp.asarray(order))
