"""Experts at work: on one device, or spread over a mesh (expert parallelism).

On a mesh tokens stay where they are and experts stay where they are: rows of the batch are split
over `data`, `fsdp` and `expert`, experts over `expert`. What meets is

- without a capacity: the devices of one `expert` group gather each other's tokens, each runs its
  own experts on what was routed to them, and partial results are summed on their way home. XLA's
  ragged all-to-all would send less, but runs on no CPU, and since nothing bounds what one expert
  receives, its buffers would have the same size.
- with a capacity: a buffer `[experts, capacity]` of each row of the batch goes to the experts'
  devices by an all-to-all, and back.

Where an expert's matrices are split further (`d_model` over `fsdp`, `d_ff` over `tensor`) they are
gathered, or the partial products added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from model.moe.dispatch import Plan, collect, combine, plan_of_rows, sorted_plan, spread
from model.moe.router import Routing
from model.remat import EXPERT_PRODUCT
from sharding import Layout, axis_names, check_experts, map_devices
from weights import grouped_matmul, is_format, matmul, specs

Array = jax.Array
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Work:
    """What experts do to their rows.

    function: `(params, rows [..., d_in], product) -> [..., d_out]`, where `product(rows, weight)`
        multiplies each row by its own expert's matrix.
    axes: logical axes of the weight `[experts, d_in, d_out]` at each key of the params,
        `{"up": ("experts", "d_model", "d_ff")}`.
    inputs: logical axis of d_in.
    outputs: logical axis of d_out.
    sums: logical axis whose pieces give partial results, to be added up.
    """

    function: Callable[..., Array]
    axes: Mapping[str, Axes]
    inputs: str | None = None
    outputs: str | None = None
    sums: str | None = None


def run(
    work: Work,
    params: Mapping[str, Any],
    x: Array,
    routing: Routing,
    layout: Layout | None,
    *,
    combined: bool = True,
    capacity: int | None = None,
) -> Array:
    """The work of each token's experts.

    Args:
        work: what they do.
        params: `{name: {"kernel": weight [experts, ...]}}`.
        x: `[batch, length, d_in]`, or `[batch, length, k, d_in]` if each of a token's experts has
            an input of its own.
        routing: which experts.
        layout: where all lives; None is one device.
        combined: add up what a token's experts give, times their gates; else give it apart.
        capacity: most tokens of a row of the batch that `routing` gives one expert, if bounded.

    Returns `[batch, length, d_out]` if combined, else `[batch, length, k, d_out]`; 0 for what is
    not kept.
    """
    kernels = {name: params[name]["kernel"] for name in work.axes}
    finish = _combined if combined else _apart
    if layout is None or layout.mesh.size == 1:
        return _sorted(work, finish, kernels, x, routing, 0)
    return _sharded(work, finish, kernels, x, routing, layout, combined, capacity)


def _sorted(
    work: Work, finish: Callable[..., Array], kernels: Any, x: Array, routing: Routing, first: Any
) -> Array:
    """Experts `first, first + 1, …` on the tokens at hand, sorted by expert."""
    index, kept = _flat(routing.index), _flat(routing.kept)
    plan, sizes = sorted_plan(index, kept, first, _count(kernels))

    def product(rows: Array, weight: Any) -> Array:
        return checkpoint_name(grouped_matmul(rows, weight, sizes), EXPERT_PRODUCT)

    rows = work.function(kernels, spread(_flat(x), plan), product)
    return finish(rows, plan, routing, x.dtype)


@dataclass(frozen=True)
class _Split:
    """Over which mesh axes tokens and experts are split.

    batch, length, experts: of these.
    gathered: those of `experts` that also split the batch, so tokens meet along them.
    partial: those along which devices give parts of a sum.
    """

    batch: tuple[str, ...]
    length: tuple[str, ...]
    experts: tuple[str, ...]
    gathered: tuple[str, ...]
    partial: tuple[str, ...]


def _split(work: Work, x: Array, layout: Layout) -> _Split:
    batch, length = (
        _dividing(layout, axis, size)
        for axis, size in zip(("batch", "length"), x.shape[:2], strict=True)
    )
    experts = _mesh_axes(layout, "experts")
    gathered = tuple(axis for axis in experts if axis in batch)
    others = tuple(axis for axis in experts if axis not in batch)
    return _Split(batch, length, experts, gathered, others + _mesh_axes(layout, work.sums))


def _sharded(
    work: Work,
    finish: Callable[..., Array],
    kernels: dict[str, Any],
    x: Array,
    routing: Routing,
    layout: Layout,
    combined: bool,
    capacity: int | None,
) -> Array:
    """`_gathered` or `_exchanged` on every device of the mesh, which holds a part of tokens and
    experts.
    """
    check_experts(layout, _count(kernels))
    split = _split(work, x, layout)
    tokens = PartitionSpec(split.batch or None, split.length or None)
    slot = () if combined else (None,)

    def local(kernels: Any, x: Array, routing: Routing) -> Array:
        kernels = _whole(work, kernels, layout)
        if capacity is None or not split.gathered or split.gathered != split.experts:
            return _gathered(work, finish, kernels, x, routing, split)[None]
        return _exchanged(work, finish, kernels, x, routing, capacity, split)[None]

    in_specs = (
        {name: _spec(work, name, weight, layout) for name, weight in kernels.items()},
        PartitionSpec(*tokens, *(None,) * (x.ndim - 3), *layout.spec((work.inputs,))),
        tokens,
    )
    out_specs = PartitionSpec(split.partial or None, *tokens, *slot, *layout.spec((work.outputs,)))
    out = map_devices(local, layout, in_specs, out_specs)(kernels, x, routing)
    # Partial sums stand on an axis of their own: added here, their gradient costs no traffic.
    return jnp.sum(out, axis=0) if split.partial else out[0]


def _gathered(
    work: Work,
    finish: Callable[..., Array],
    kernels: Any,
    x: Array,
    routing: Routing,
    split: _Split,
) -> Array:
    """This device's experts on the tokens of all devices of its group, summed where they live."""
    first = jax.lax.axis_index(split.experts) * _count(kernels) if split.experts else 0
    if not split.gathered:
        return _sorted(work, finish, kernels, x, routing, first)
    gather = functools.partial(jax.lax.all_gather, axis_name=split.gathered, axis=0, tiled=True)
    x, routing = jax.tree.map(gather, (x, routing))
    out = _sorted(work, finish, kernels, x, routing, first)
    return jax.lax.psum_scatter(out, split.gathered, scatter_dimension=0, tiled=True)


def _exchanged(
    work: Work,
    finish: Callable[..., Array],
    kernels: Any,
    x: Array,
    routing: Routing,
    capacity: int,
    split: _Split,
) -> Array:
    """Buffers `[rows, experts, slots]` to the experts' devices and back.

    Devices that hold parts of the same rows fill different slots of them; each then takes a part of
    the slots, whose number is the capacity rounded up to divide.
    """
    parts = jax.lax.axis_size(split.length) if split.length else 1
    slots = -(-capacity // parts) * parts
    rows, experts = x.shape[0], _count(kernels) * jax.lax.axis_size(split.experts)
    plan = _buffer_plan(routing, experts, slots)
    sent = spread(_flat(x), plan).reshape(rows, experts, slots, -1)
    if split.length:
        sent = jax.lax.psum_scatter(sent, split.length, scatter_dimension=2, tiled=True)
    here = jax.lax.all_to_all(sent, split.experts, split_axis=1, concat_axis=0, tiled=True)
    mine = jnp.moveaxis(here, 1, 0)
    made = work.function(kernels, mine.reshape(mine.shape[0], -1, mine.shape[-1]), jax.vmap(matmul))
    made = jnp.moveaxis(made.reshape(*mine.shape[:3], -1), 0, 1)
    back = jax.lax.all_to_all(made, split.experts, split_axis=0, concat_axis=1, tiled=True)
    if split.length:
        back = jax.lax.all_gather(back, split.length, axis=2, tiled=True)
    return finish(back.reshape(rows * experts * slots, -1), plan, routing, x.dtype)


def _buffer_plan(routing: Routing, experts: int, slots: int) -> Plan:
    """Each kept assignment in its place of the buffer `[rows, experts, slots]`."""
    assert routing.place is not None
    rows = routing.index.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    place = (row * experts + routing.index) * slots + routing.place
    place = jnp.where(routing.kept, place, rows * experts * slots)
    return plan_of_rows(_flat(place), rows * experts * slots)


def _combined(rows: Array, plan: Plan, routing: Routing, dtype: Any) -> Array:
    out = combine(rows, plan, _flat(routing.gate)).astype(dtype)
    return out.reshape(*routing.index.shape[:2], -1)


def _apart(rows: Array, plan: Plan, routing: Routing, dtype: Any) -> Array:
    return collect(rows, plan).astype(dtype).reshape(*routing.index.shape, -1)


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _count(kernels: Mapping[str, Any]) -> int:
    """Experts that the weights at hand hold."""
    weight = next(iter(kernels.values()))
    return (jax.tree.leaves(weight)[0] if is_format(weight) else weight).shape[0]


def _spec(work: Work, name: str, weight: Any, layout: Layout) -> Any:
    """How a weight enters: as it is stored, but formats with whole columns of `d_model`."""
    if not is_format(weight):
        return layout.spec(work.axes[name])
    axes = (None if axis == "d_model" else axis for axis in work.axes[name])
    first, *matrix = layout.spec(tuple(axes))
    pieces = specs(weight, PartitionSpec(*matrix))
    return jax.tree.map(
        lambda piece: PartitionSpec(first, *piece),
        pieces,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _whole(work: Work, kernels: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The weights with `d_model` gathered over the devices that it is split over."""
    over = _mesh_axes(layout, "d_model")
    if not over:
        return kernels
    return {
        name: weight
        if is_format(weight)
        else jax.lax.all_gather(weight, over, axis=work.axes[name].index("d_model"), tiled=True)
        for name, weight in kernels.items()
    }


def _mesh_axes(layout: Layout, logical: str | None) -> tuple[str, ...]:
    return axis_names(layout.spec((logical,))[0])


def _dividing(layout: Layout, logical: str, size: int) -> tuple[str, ...]:
    """The mesh axes of a logical axis, or none if they do not divide it (one token, say)."""
    return _mesh_axes(layout, logical) if size % layout.size(logical) == 0 else ()
