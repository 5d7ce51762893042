"""Collectives that a training step places itself, for meshes whose links are not alike.

Weights may be split over the fast axes of the mesh only, gradients over more, optimizer state over
all (Frontier's low-bandwidth partitioning, Wang et al. 2025, arXiv 2501.04266); a secondary copy
may be kept between forward and backward pass (hpZ), weights may travel in int8 (qwZ) and gradients
in int8 or int4 (qgZ; ZeRO++, Wang et al. 2023, arXiv 2306.10209). All functions run inside
`jax.shard_map` over the axes that split the batch; `training.hierarchical` calls them.

An exchange is a chain of hops, one mesh axis each: reductions from the fastest to the slowest,
gathers back. A hop of a reduction is an all-to-all, decoded and summed in float32, so gradients are
rounded once a hop and sums never.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from sharding.coded import Coding, coding_for
from sharding.layout import ROLES, Layout, axis_names
from sharding.mesh import AXES
from sharding.rules import STACKED, Rule
from weights import matmul, matmul_transposed

Array = jax.Array
Dims = tuple[tuple[str, ...], ...]
"""Mesh axes that each dimension of an array is split over, the outermost first."""

SECONDARY = "secondary_weights"
"""Name of the copies that stay from the forward to the backward pass, whatever is recomputed."""

SMALLEST = 1024
"""Arrays of fewer elements, all devices together, travel as they are."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """Over which of the axes that split the batch one array is split, role by role.

    weights, gradients, optimizer: of each dimension; each within the next.
    secondary: axes of `weights` that still split the copy which the backward pass gathers.
    gather, reduce: how the array travels.
    """

    weights: Dims
    gradients: Dims
    optimizer: Dims
    secondary: tuple[str, ...] = ()
    gather: Coding = Coding()
    reduce: Coding = Coding()

    @property
    def in_backward(self) -> Dims:
        """Axes that a gradient is scattered over once a micro-batch, after those of `weights`."""
        return _beyond(self.gradients, self.weights)

    @property
    def in_step(self) -> Dims:
        """Axes that a gradient is scattered over once a step."""
        return _beyond(self.optimizer, self.gradients)

    @property
    def in_update(self) -> Dims:
        """Axes that new weights are gathered over once a step."""
        return _beyond(self.optimizer, self.weights)


def roles_of(path: str, shape: Sequence[int], rule: Rule, layout: Layout) -> Roles:
    """The roles of the array at `path` (of one layer of a stack: without the stack's axis)."""
    collectives = layout.collectives
    assert collectives is not None
    axes = rule.axes_at(path)
    if STACKED.fullmatch(path):
        axes, shape = axes[1:], shape[1:]
    every = [[axis_names(entry) for entry in layout.spec(axes, role)] for role in ROLES]
    batch = layout.batch_axes
    weights, gradients, optimizer = (
        tuple(tuple(axis for axis in names if axis in batch) for names in dims) for dims in every
    )
    local = tuple(
        size // math.prod(layout.mesh.shape[axis] for axis in names)
        for size, names in zip(shape, every[-1], strict=True)
    )
    table = path.endswith("/table")  # its rows are of unlike size, and so are their gradients
    return Roles(
        weights,
        gradients,
        optimizer,
        tuple(axis for axis in collectives.secondary if axis in _all(weights)),
        *(
            coding_for(name, collectives.block, local, axis=-1 if table else None)
            if math.prod(shape) >= SMALLEST
            else Coding()
            for name in (_for_weights(collectives.gather, table), collectives.reduce)
        ),
    )


def _for_weights(precision: str, table: bool) -> str:
    """What is looked up row by row is not rounded to integers."""
    return "bfloat16" if table and precision == "int8" else precision


def gather(shard: Array, dims: Dims, coding: Coding, secondary: Sequence[str] = ()) -> Array:
    """The array, float32, that is split over `dims`; slow axes first.

    With `secondary` axes the others are gathered first, and what that gives is named `SECONDARY`:
    a policy that keeps this name lets the backward pass repeat the gather over `secondary` alone.
    """
    order = sorted(_all(dims), key=lambda axis: (axis in secondary, AXES.index(axis)))
    message = coding.encode(shard)
    for index, axis in enumerate(order):
        if axis in secondary and (index == 0 or order[index - 1] not in secondary):
            message = jax.tree.map(lambda x: checkpoint_name(x, SECONDARY), message)
        message = jax.tree.map(functools.partial(jax.lax.all_gather, axis_name=axis), message)
    together = functools.partial(_together, dims=dims, order=order[::-1])
    return coding.decode(jax.tree.map(together, message))


def scatter(x: Array, dims: Dims, coding: Coding) -> Array:
    """The sum of `x` over all devices of `dims`, float32, of which each keeps its own piece.

    Fast axes first. Devices end with the pieces that one `psum_scatter` would leave them, since
    pieces stand in the order of the hops before the first one (ZeRO++'s swizzle; `swizzle_index`).
    """
    order = _fast_first(dims)
    x = _apart(x.astype(jnp.float32), dims, order)
    for done, axis in enumerate(order):
        x = _hop(coding.encode(x, len(order) - done), axis)
    return x


def scatter_once(x: Array, dims: Dims, coding: Coding, residual: Array | None = None) -> Any:
    """As `scatter` in one hop over all axes of `dims` at once: `(piece, residual)`.

    With a residual, float32 in the shape of `x`, error feedback (Karimireddy et al. 2019, arXiv
    1901.09847): it is added before rounding, and what rounding takes away is the next one.
    """
    order = _fast_first(dims)
    whole = x.astype(jnp.float32) + (0 if residual is None else residual)
    cut = _apart(whole, dims, order)
    rows = cut.reshape(-1, *cut.shape[len(order) :])
    message = coding.encode(rows, 1)
    if residual is not None:
        lost = (rows - coding.decode(message)).reshape(cut.shape)
        residual = _together(lost, dims, order)
    return _hop(message, tuple(order)), residual


def swizzle_index(nodes: int, local: int) -> tuple[int, ...]:
    """Where pieces go before a reduction over `local` devices of a node, then over `nodes`.

    So that device `node * local + i` ends with piece `node * local + i`: 2 nodes of 4 devices take
    0, 4, 1, 5, 2, 6, 3, 7 (ZeRO++, section 3.3).
    """
    return tuple(node * local + index for index in range(local) for node in range(nodes))


def weight_of(shard: Array, roles: Roles) -> Array:
    """The whole array of a shard split as `weights`, float32; its gradient is reduced on its way
    back over the same axes.
    """
    fixed = jax.lax.stop_gradient(shard)
    return _straight_through(
        roles, shard, gather(fixed, roles.weights, roles.gather, roles.secondary)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(roles: Roles, shard: Array, whole: Array) -> Array:
    """`whole`, as if it were an exact function of the shard."""
    return whole


def _forward(roles: Roles, shard: Array, whole: Array) -> tuple[Array, Array]:
    return whole, jnp.zeros((), shard.dtype)


def _backward(roles: Roles, like: Array, gradient: Array) -> tuple[Array, None]:
    return scatter(gradient, roles.weights, roles.reduce).astype(like.dtype), None


_straight_through.defvjp(_forward, _backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """A matrix of which each device holds a shard, gathered where it is multiplied: a weight format
    (`weights.protocol`), of one device's view.

    shard: `[d_in, d_out]` less what is split over `roles.weights`; `[layers, …]` in a stack.
    again: gather once more in the backward pass, not keep the whole matrix; for layers of which
        nothing else is recomputed.
    """

    shard: Array
    roles: Roles = dataclasses.field(metadata={"static": True})
    again: bool = dataclasses.field(metadata={"static": True})

    def _apply(self, function: Callable[..., Array], *args: Array) -> Array:
        def run(shard: Array, *args: Array) -> Array:
            return function(weight_of(shard, self.roles), *args)

        if self.again:
            keep = jax.checkpoint_policies.save_only_these_names(SECONDARY)
            run = jax.checkpoint(run, policy=keep)
        return run(self.shard, *args)

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., d_in] -> float32[..., d_out]`."""
        return self._apply(lambda whole, x: matmul(x, whole, dtype=jnp.float32), x)

    def matmul_transposed(self, x: Array) -> Array:
        """`x @ table.T`, float32."""
        return self._apply(lambda whole, x: matmul_transposed(x, whole, jnp.float32), x)

    def lookup(self, ids: Array) -> Array:
        """Rows of a table."""
        return self._apply(
            lambda whole, ids: jnp.take(whole, ids, axis=0, mode="fill", fill_value=0), ids
        )

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The whole matrix."""
        return weight_of(self.shard, self.roles).astype(dtype)

    def nbytes(self) -> int:
        """Bytes of the shard."""
        return self.shard.size * self.shard.dtype.itemsize

    def prepare(self, backend: str) -> Gathered:
        """Itself."""
        return self

    def specs(self, spec: PartitionSpec) -> Gathered:
        """The spec of the shard."""
        return dataclasses.replace(self, shard=spec)  # pyright: ignore[reportArgumentType]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(d_in, d_out)` of the whole matrix."""
        sizes = [math.prod(map(jax.lax.axis_size, axes)) for axes in self.roles.weights]
        here = self.shard.shape[-2:]
        return tuple(size * n for size, n in zip(here, sizes, strict=True))

    @property
    def size(self) -> int:
        """Values of the whole matrix, of all layers of a stack."""
        return math.prod(self.shard.shape[:-2]) * math.prod(self.shape)

    def nominal_bits(self) -> float:
        """Those of the shard."""
        return 8.0 * self.shard.dtype.itemsize


def local_layout(layout: Layout | None) -> Layout | None:
    """The layout as it is inside `jax.shard_map`: without the axes that are divided there."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    if layout is None or not manual & set(layout.mesh.axis_names):
        return layout
    tables = {
        role: tuple(
            (logical, tuple(axis for axis in axes if axis not in manual))
            for logical, axes in getattr(layout, role)
        )
        for role in ROLES
    }
    return dataclasses.replace(layout, mesh=mesh, collectives=None, **tables)


def _hop(message: Any, axis: Any) -> Array:
    """Row i of all devices summed on device i, float32: `[n, …] -> […]`."""
    if isinstance(message, Array) and message.dtype == jnp.float32:
        return jax.lax.psum_scatter(message, axis, scatter_dimension=0)
    send = functools.partial(
        jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
    )
    return jnp.sum(Coding.decode(jax.tree.map(send, message)), axis=0)


def _apart(x: Array, dims: Dims, order: Sequence[str]) -> Array:
    """Pieces by device: `[…] -> [*sizes of the axes in order, … divided]`."""
    shape, places, rest = [], {}, []
    for size, axes in zip(x.shape, dims, strict=True):
        counts = [jax.lax.axis_size(axis) for axis in axes]
        places.update({axis: len(shape) + index for index, axis in enumerate(axes)})
        rest.append(len(shape) + len(axes))
        shape += [*counts, size // math.prod(counts)]
    return x.reshape(shape).transpose([*(places[axis] for axis in order), *rest])


def _together(x: Array, dims: Dims, order: Sequence[str]) -> Array:
    """The inverse of `_apart`."""
    lead, moved, shape = len(order), [], []
    for index, axes in enumerate(dims):
        mine = [*map(order.index, axes), lead + index]
        moved += mine
        shape.append(math.prod(x.shape[place] for place in mine))
    return x.transpose(moved).reshape(shape)


def _beyond(outer: Dims, inner: Dims) -> Dims:
    return tuple(axes[len(before) :] for axes, before in zip(outer, inner, strict=True))


def _all(dims: Dims) -> list[str]:
    return [axis for axes in dims for axis in axes]


def _fast_first(dims: Dims) -> list[str]:
    return sorted(_all(dims), key=AXES.index, reverse=True)
