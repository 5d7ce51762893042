"""The head and the loss of a piece of the tokens at a time, so that all logits never exist at once.

On a mesh each device cuts its own tokens and sums the head's gradient over the pieces by itself, in
float32; devices exchange it once, after the last piece. For that the head's arrays get an axis in
front: a copy for each part of the tokens, and each copy where its part is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import Layout, axis_names
from training.cross_entropy import Entropy, token_cross_entropy

Array = jax.Array
FREE = PartitionSpec.UNCONSTRAINED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns the last hidden states into logits.

    params: its arrays. function: `(params, hidden [batch, length, d_model], layout) -> logits
    [batch, length, vocab]`. layout: where tokens are; None is one device. gradients: of each array
    of params, in order, where its gradient belongs; empty leaves that to the compiler.
    """

    params: Any
    function: Callable[..., Array] = dataclasses.field(metadata={"static": True})
    layout: Layout | None = dataclasses.field(default=None, metadata={"static": True})
    gradients: tuple[NamedSharding, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __call__(self, hidden: Array) -> Array:
        """Logits of hidden states."""
        return self.function(self.params, hidden, self.layout)


def head_cross_entropy(
    head: Head,
    hidden: Array,
    targets: Array,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Entropy:
    """`token_cross_entropy(head(hidden), targets)` with the logits of about `chunk` of a device's
    tokens alive at one time; None or 0 is all of them.

    hidden `[batch, length, d_model]`, targets `int32[batch, length]`. Pieces are equal, so a number
    of tokens with few divisors gets smaller ones. Backward computes a piece's logits again.
    """
    leaves, tree = jax.tree.flatten(head.params)
    parts = _Parts.of(head.layout, targets.shape)
    tokens = targets.size // parts.count
    plain = all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)
    if not chunk or chunk >= tokens or not plain:  # coded weights have no gradient to sum
        return token_cross_entropy(head(hidden), targets, label_smoothing)
    pieces = next(n for n in range(-(-tokens // chunk), tokens + 1) if tokens % n == 0)
    layout = None if head.layout is None else head.layout.replicate("batch", "length")

    def one(leaves: Sequence[Array], hidden: Array, targets: Array) -> Entropy:
        scores = head.function(jax.tree.unflatten(tree, leaves), hidden[None], layout)[0]
        return token_cross_entropy(scores, targets, label_smoothing)

    work = _Work(parts.mapped(one), parts, head.gradients)
    x, ids = (parts.cut(array, pieces) for array in (hidden, targets))
    by_piece = _by_piece(work, leaves, x, ids)
    return jax.tree.map(lambda values: parts.joined(values, targets.shape), by_piece)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of a batch's tokens that devices hold.

    rows, columns: parts along batch and length. axes: of the mesh, over which they lie.
    """

    rows: int = 1
    columns: int = 1
    axes: tuple[str, ...] = ()
    mesh: Mesh | None = None

    @classmethod
    def of(cls, layout: Layout | None, shape: tuple[int, ...]) -> _Parts:
        """Those of tokens `[batch, length]`; one part where the mesh does not divide them."""
        if layout is None:
            return cls()
        rows, columns = layout.size("batch"), layout.size("length")
        if rows * columns == 1 or shape[0] % rows or shape[1] % columns:
            return cls()
        entries = layout.spec(("batch", "length"))
        axes = tuple(axis for entry in entries for axis in axis_names(entry))
        return cls(rows, columns, axes, layout.mesh)

    @property
    def count(self) -> int:
        """How many."""
        return self.rows * self.columns

    def mapped(self, one: Callable[..., Any]) -> Callable[..., Any]:
        """`one` over an axis of parts in front of all its arguments."""
        if self.mesh is not None:
            return jax.vmap(one, spmd_axis_name=self.axes)
        return lambda *given: jax.tree.map(
            lambda x: x[None], one(*jax.tree.map(lambda x: x[0], given))
        )

    def cut(self, x: Array, pieces: int) -> Array:
        """`[batch, length, …] -> [pieces, parts, tokens of a piece, …]`."""
        batch, length, *rest = x.shape
        x = x.reshape(self.rows, batch // self.rows, self.columns, length // self.columns, *rest)
        x = self.place(jnp.moveaxis(x, 2, 1).reshape(self.count, pieces, -1, *rest))
        return self.place(jnp.moveaxis(x, 1, 0), 1)

    def joined(self, x: Array, shape: tuple[int, ...]) -> Array:
        """`[pieces, parts, tokens of a piece, …] -> [batch, length]`."""
        x = self.place(jnp.moveaxis(x, 1, 0).reshape(self.count, -1))
        batch, length = shape[0] // self.rows, shape[1] // self.columns
        x = x.reshape(self.rows, self.columns, batch, length)
        return jnp.moveaxis(x, 1, 2).reshape(shape)

    def copies(self, x: Array) -> Array:
        """`[...] -> [parts, ...]`."""
        return self.place(jnp.broadcast_to(x, (self.count, *x.shape)))

    def place(self, x: Array, axis: int = 0) -> Array:
        """`x`, whose `axis` runs over the parts, with each part where it belongs."""
        if self.mesh is None:
            return x
        spec = PartitionSpec(*[FREE] * axis, self.axes, *[FREE] * (x.ndim - axis - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


@dataclasses.dataclass(frozen=True)
class _Work:
    """How a piece is computed: `one(copies of leaves, hidden [parts, tokens, d_model], targets)`;
    and where the gradients of the leaves belong.
    """

    one: Callable[..., Entropy]
    parts: _Parts
    gradients: tuple[NamedSharding, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_piece(work: _Work, leaves: list[Array], hidden: Array, targets: Array) -> Entropy:
    """`[pieces, parts, tokens, …] -> Entropy` of `[pieces, parts, tokens]`."""
    copies = [work.parts.copies(leaf) for leaf in leaves]
    return jax.lax.map(lambda piece: work.one(copies, *piece), (hidden, targets))


def _forward(work: _Work, *given: Any) -> tuple[Entropy, Any]:
    return _by_piece(work, *given), given


def _backward(work: _Work, given: Any, cotangents: Entropy) -> tuple[Any, Array, None]:
    leaves, hidden, targets = given
    copies = [work.parts.copies(leaf) for leaf in leaves]

    def body(sums: Any, piece: tuple[Array, Array, Entropy]) -> tuple[Any, Array]:
        x, ids, cotangent = piece
        _, back = jax.vjp(lambda own, x: work.one(own, x, ids), copies, x)
        gradient, of_x = back(cotangent)
        return jax.tree.map(lambda total, g: total + g.astype(jnp.float32), sums, gradient), of_x

    zeros = [work.parts.place(jnp.zeros(copy.shape, jnp.float32)) for copy in copies]
    sums, of_hidden = jax.lax.scan(body, zeros, (hidden, targets, cotangents))
    totals = [jnp.sum(total, axis=0) for total in sums]
    if work.gradients:
        totals = list(map(jax.lax.with_sharding_constraint, totals, work.gradients))
    of_leaves = [t.astype(leaf.dtype) for t, leaf in zip(totals, leaves, strict=True)]
    return of_leaves, of_hidden, None


_by_piece.defvjp(_forward, _backward)
