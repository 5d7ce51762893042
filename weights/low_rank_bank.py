"""Any weight beside the low-rank adapters of several models, one of which each row of the input
names (the batched products of Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285).

y[t] = x[t] base + sum of scale[c] (x[t] a[:, c]) b[c, :] over the columns c of chosen[t]

The columns of all adapters stand side by side, so they are two dense products with a mask between:
no matrix is gathered and no row moved, an adapter takes as many columns as it has ranks, and one
that leaves a matrix alone takes none there.
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
from weights.low_rank import LowRank
from weights.nested import OverBase
from weights.product import product

Array = jax.Array
NOBODY = -1
"""Owner of columns that only fill up a stack."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scale", "owner", "chosen"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LowRankBank(OverBase):
    """A base `[K, N]`, an array or any format, with adapters of R ranks in all; `join` makes one.

    a: [K, R]. b: [R, N]. scale: float32[R]. owner: int32[R], the adapter of each column, from 1 on.
    chosen: int32, the adapter of each row of the input, 0 for none, in the shape of its leading
        axes or one that broadcasts to it. `choose` sets it; None, as it is stored, is none for all.
    """

    base: Any
    a: Array
    b: Array
    scale: Array
    owner: Array
    chosen: Array | None = None

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`; the parts are added in float32, and a row without
        adapter is the base's to the bit.
        """
        y = layers.matmul(x, self.base, rng=rng, dtype=jnp.float32)
        if self.chosen is not None:
            y = y + product(self._own(product(x, self.a)).astype(x.dtype), self.b)
        return y.astype(x.dtype)

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]`, against the transposed matrices."""
        y = layers.matmul_transposed(x, self.base, jnp.float32)
        if self.chosen is not None:
            y = y + product(self._own(product(x, self.b, 1)).astype(x.dtype), self.a, 1)
        return y.astype(x.dtype)

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        found = layers.lookup(self.base, ids)
        if self.chosen is None:
            return found
        ours = jnp.take(self.a, ids, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        return found + product(self._own(ours), self.b)

    def _own(self, inner: Array) -> Array:
        """`[..., R]` times the scales, and zero in columns of other adapters than the row's."""
        assert self.chosen is not None
        return jnp.where(self.chosen[..., None] == self.owner, inner * self.scale, 0)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The base: what rows without adapter are multiplied by."""
        return protocol.dequantize(self.base, dtype)

    @property
    def separable(self) -> tuple[bool, bool]:
        """As the base."""
        return protocol.separable(self.base)

    def specs(self, spec: PartitionSpec) -> LowRankBank:
        """Ranks are never split."""
        inputs, outputs = code_forms.matrix_axes(spec)
        whole: Any = PartitionSpec()
        return LowRankBank(
            protocol.specs(self.base, spec),
            a=PartitionSpec(inputs, None),  # pyright: ignore[reportArgumentType]
            b=PartitionSpec(None, outputs),  # pyright: ignore[reportArgumentType]
            scale=whole,
            owner=whole,
            chosen=None if self.chosen is None else whole,
        )

    def aligned(self, layers: Sequence[LowRankBank]) -> list[LowRankBank]:
        """The same layers, all with as many columns as the one with most."""
        most = max(layer.a.shape[-1] for layer in layers)
        return [layer._filled(most - layer.a.shape[-1]) for layer in layers]

    def _filled(self, more: int) -> LowRankBank:
        behind = [(0, 0)] * (self.a.ndim - 2) + [(0, more)]
        return dataclasses.replace(
            self,
            a=jnp.pad(self.a, [(0, 0), *behind]),
            b=jnp.pad(self.b, [*behind, (0, 0)]),
            scale=jnp.pad(self.scale, behind),
            owner=jnp.pad(self.owner, behind, constant_values=NOBODY),
        )


def join(base: Any, adapters: Sequence[LowRank | None], dtype: Any = None) -> LowRankBank:
    """A bank over `base` of adapters 1, 2, …, of any ranks; None leaves this matrix alone.

    Args:
        base: `[K, N]` or a stack of layers, an array or any format.
        adapters: of the same matrix; their own bases and dropout are left out.
        dtype: of `a` and `b`; None keeps the adapters'.

    Raises `ValueError` if there is none, or one is of another shape than the base.
    """
    held = {number: one for number, one in enumerate(adapters, 1) if one is not None}
    if not held:
        raise ValueError("a bank needs an adapter; there is none")
    for number, one in held.items():
        _check(number, one, base)
    a = jnp.concatenate([one.a for one in held.values()], axis=-1)
    b = jnp.concatenate([one.b for one in held.values()], axis=-2)
    owner = np.repeat(list(held), [one.a.shape[-1] for one in held.values()]).astype(np.int32)
    return LowRankBank(
        base,
        a if dtype is None else a.astype(dtype),
        b if dtype is None else b.astype(dtype),
        jnp.concatenate([_by_column(one) for one in held.values()], axis=-1),
        jnp.broadcast_to(owner, (*a.shape[:-2], len(owner))),
    )


def choose(params: Any, adapters: Array) -> Any:
    """The same params, with the adapter of each row of their input set in every bank.

    adapters: int32, in the shape of the tokens, `[batch, length]`, or one that broadcasts to it
    (`[batch, 1]`); 0 is none, and so is a number that a bank does not have.
    """

    def set_in(weight: Any) -> Any:
        if not isinstance(weight, LowRankBank):
            return weight
        stack = weight.a.shape[:-2]
        return dataclasses.replace(
            weight, chosen=jnp.broadcast_to(adapters, (*stack, *jnp.shape(adapters)))
        )

    return jax.tree.map(set_in, params, is_leaf=protocol.is_weight)


def _by_column(adapter: LowRank) -> Array:
    """The scale of each column, `float32[..., r]`."""
    scale = jnp.asarray(adapter.scale, jnp.float32)[..., None]
    return jnp.broadcast_to(scale, (*adapter.a.shape[:-2], adapter.a.shape[-1]))


def _check(number: int, adapter: LowRank, base: Any) -> None:
    rows, columns = base.shape[-2:]
    layers = protocol.size(base) // (rows * columns)
    shape = (*adapter.a.shape[:-1], adapter.b.shape[-1])
    if shape not in ((rows, columns), (layers, rows, columns)):
        raise ValueError(
            f"adapter {number} is one of weights {list(shape)}; the base is "
            f"{[layers, rows, columns] if layers > 1 else [rows, columns]}"
        )
