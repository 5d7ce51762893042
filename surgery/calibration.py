"""What a method learns about the inputs of a linear layer: sums over calibration tokens.

Statistics are per site, the tensor that a group of linear layers reads (query, key and value read
one). They are sums, so that any order of batches, devices and processes gives the same up to
rounding, and memory does not grow with the number of tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sharding import Layout, axis_names

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stats:
    """Sums over the tokens that a site has seen; K is its width.

    gram: float32[K, K], sum of x x^T.
    count: int32[], tokens.
    total, absolute: float32[K], sums of x and |x|.
    low, high: float32[K], least and greatest x.
    """

    gram: Array
    count: Array
    total: Array
    absolute: Array
    low: Array
    high: Array

    @property
    def mean(self) -> Array:
        """Mean of each channel, `[K]`."""
        return self.total / jnp.maximum(self.count, 1)

    @property
    def absmean(self) -> Array:
        """Mean magnitude of each channel, `[K]`."""
        return self.absolute / jnp.maximum(self.count, 1)

    @property
    def absmax(self) -> Array:
        """Greatest magnitude of each channel, `[K]`."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))

    def hessian(self) -> Array:
        """`2 X^T X / tokens`, `[K, K]`: of the squared error of an output, with respect to its
        column of the weight.
        """
        return 2.0 * self.gram / jnp.maximum(self.count, 1)

    def scaled(self, factor: Array) -> Stats:
        """The statistics of `x * factor`, for a positive `factor [K]`."""
        return Stats(
            gram=self.gram * factor[:, None] * factor[None, :],
            count=self.count,
            total=self.total * factor,
            absolute=self.absolute * factor,
            low=self.low * factor,
            high=self.high * factor,
        )


def empty(width: int, *lead: int) -> Stats:
    """Statistics of no token; with `lead`, stacks of them: one for each device's share of the
    batch, then for each expert.
    """
    shape = (*lead, width)
    return Stats(
        gram=jnp.zeros((*lead, width, width), jnp.float32),
        count=jnp.zeros(lead, jnp.int32),
        total=jnp.zeros(shape, jnp.float32),
        absolute=jnp.zeros(shape, jnp.float32),
        low=jnp.full(shape, jnp.inf, jnp.float32),
        high=jnp.full(shape, -jnp.inf, jnp.float32),
    )


def update(stats: Stats, x: Array, valid: Array | None = None) -> Stats:
    """Add tokens `x [..., K]`; those where `valid [...]` is False are left out.

    The products are summed in float32 of full precision: in bfloat16 or TF32 a Gram matrix with
    outlier channels is no longer positive definite.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    keep = jnp.ones(x.shape[:1], bool) if valid is None else valid.reshape(-1)
    x = jnp.where(keep[:, None], x, 0.0)
    added = Stats(
        gram=jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST),
        count=jnp.sum(keep, dtype=jnp.int32),
        total=jnp.sum(x, axis=0),
        absolute=jnp.sum(jnp.abs(x), axis=0),
        low=jnp.min(jnp.where(keep[:, None], x, jnp.inf), axis=0, initial=jnp.inf),
        high=jnp.max(jnp.where(keep[:, None], x, -jnp.inf), axis=0, initial=-jnp.inf),
    )
    return merge(stats, added)


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of the tokens of both."""
    return Stats(
        gram=a.gram + b.gram,
        count=a.count + b.count,
        total=a.total + b.total,
        absolute=a.absolute + b.absolute,
        low=jnp.minimum(a.low, b.low),
        high=jnp.maximum(a.high, b.high),
    )


def update_parts(stats: Stats, x: Array, layout: Layout | None) -> Stats:
    """`update` of stacked statistics by a batch `[batch, length, K]`, each by its share of it.

    On a mesh every device adds its own rows to its own panel of columns: nothing is sent until
    `finish`.
    """
    parts = stats.count.shape[0]
    x = x.reshape(parts, -1, x.shape[-1])
    if layout is not None and layout.mesh.size > 1:
        batch = axis_names(layout.spec(("batch",))[0])
        place = NamedSharding(layout.mesh, PartitionSpec(batch or None, None, None))
        x = jax.lax.with_sharding_constraint(x, place)
    return jax.lax.with_sharding_constraint(jax.vmap(update)(stats, x), shardings(stats, layout))


def finish(stats: Stats) -> Stats:
    """One statistics of stacked ones, merged in order."""
    parts = stats.count.shape[0]
    total = jax.tree.map(lambda leaf: leaf[0], stats)
    for part in range(1, parts):
        total = merge(total, jax.tree.map(lambda leaf: leaf[part], stats))
    return total


def shardings(stats: Stats, layout: Layout | None) -> Stats:
    """Where stacked statistics lie: a part where its rows of the batch are, the Gram matrix in
    panels over the axes of `d_ff`.
    """
    if layout is None or layout.mesh.size == 1:
        device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
        one = jax.sharding.SingleDeviceSharding(device)
        return jax.tree.map(lambda _: one, stats)
    (batch,), (panel,) = layout.spec(("batch",)), layout.spec(("d_ff",))
    whole = NamedSharding(layout.mesh, PartitionSpec(batch))
    between = (None,) * (stats.gram.ndim - 2)
    divides = stats.gram.shape[-1] % layout.size("d_ff") == 0
    panels = PartitionSpec(batch, *between, panel if divides else None)
    places = jax.tree.map(lambda _: whole, stats)
    return dataclasses.replace(places, gram=NamedSharding(layout.mesh, panels))
