"""Gradients of a step that places its own collectives: as `training.step.batch_gradients`.

Every device of the axes that split the batch takes the gradient of its own rows inside
`jax.shard_map`; the other axes of the mesh stay the compiler's. Masters lie where the optimizer
state does. Once a step they are gathered to where the weights lie; weights are gathered where they
are used, and gradients reduced on their way back (`sharding.hierarchical`). What the gradients'
table does not split is reduced once a step, not once a micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sharding import (
    Gathered,
    Layout,
    Roles,
    Rule,
    gather,
    match_rules,
    roles_of,
    scatter,
    scatter_once,
    weight_of,
)
from sharding.hierarchical import Dims
from sharding.rules import STACKED
from training.gradients import micro_gradients
from training.objectives import Apply, Metrics, Objective
from training.trainable import Predicate, map_leaves, merge
from weights import flatten, is_format

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """How the arrays of a run travel.

    layout: the mesh, the tables and the collectives.
    roles: of every array by path; weight formats have none, they are whole on every device.
    formats: whether `apply` multiplies by weight formats, so that matrices are gathered where they
        are used and not before the first layer.
    again: whether layers keep what they do not mark, so that matrices must be gathered once more.
    """

    layout: Layout
    roles: Mapping[str, Roles]
    formats: bool
    again: bool


def hierarchy(
    layout: Layout,
    params: Any,
    rules: Sequence[Rule],
    trainable: Predicate,
    *,
    formats: bool,
    again: bool,
) -> Hierarchy | None:
    """How the arrays of `params` travel; None where the compiler decides, or the
    batch lies on one device.

    Raises `ValueError` that names the field where the mesh or the tables allow no such step.
    """
    collectives, mesh = layout.collectives, layout.mesh
    if collectives is None or not layout.batch_axes:
        return None
    if mesh.shape["stage"] > 1:
        raise ValueError(
            f"mesh.stage={mesh.shape['stage']}: sharding.gather, reduce, secondary and "
            "error_feedback need stage=1"
        )
    if mesh.shape["context"] > 1 and mesh.shape["tensor"] > 1:
        raise ValueError(
            f"mesh.context={mesh.shape['context']} and mesh.tensor={mesh.shape['tensor']}: XLA "
            "cannot compile sharding.gather, reduce, secondary or error_feedback with both; use one"
        )
    flat = flatten(params)
    matched = match_rules(rules, flat)
    if mesh.shape["expert"] > 1 and any("experts" in rule.axes for rule in matched.values()):
        raise ValueError(
            f"mesh.expert={mesh.shape['expert']}: sharding.gather, reduce, secondary and "
            "error_feedback do not spread experts; use expert=1, or leave them out"
        )
    roles = {
        path: roles_of(path, leaf.shape, matched[path], layout)
        for path, leaf in flat.items()
        if not is_format(leaf)
    }
    ours = {path: found for path, found in roles.items() if trainable(path)}
    _check_reduced(layout, ours)
    return Hierarchy(layout, roles, formats, again)


def _check_reduced(layout: Layout, roles: Mapping[str, Roles]) -> None:
    collectives = layout.collectives
    assert collectives is not None
    scattered = [axis for one in roles.values() for axes in one.optimizer for axis in axes]
    if collectives.reduce != "float32" and not scattered:
        raise ValueError(
            f"sharding.reduce={collectives.reduce!r}: nothing splits the optimizer state, so "
            "gradients are summed whole; set mesh.fsdp, or sharding.optimizer=(('d_model', "
            "('data',)),)"
        )
    if collectives.error_feedback and not any(map(_feeds_back, roles.values())):
        raise ValueError(
            "sharding.error_feedback: no gradient is rounded once a step; it needs reduce='int8' "
            "or 'int4' and mesh axes that split the optimizer state but not the gradients"
        )


def _feeds_back(roles: Roles) -> bool:
    return any(roles.in_step) and roles.reduce.precision in ("int8", "int4")


def abstract_feedback(how: Hierarchy | None, params: Any, trainable: Predicate) -> Any:
    """The residuals that error feedback keeps, as float32 shapes; None where it keeps none.

    Each is `[devices, …]`: one of every device that gradients are not split over.
    """
    if how is None or how.layout.collectives is None or not how.layout.collectives.error_feedback:
        return None
    mesh = how.layout.mesh

    def one(path: str, leaf: Any) -> Any:
        roles = how.roles.get(path)
        if roles is None or not trainable(path) or not _feeds_back(roles):
            return None
        apart = _outside(how, roles.gradients)
        count = math.prod(mesh.shape[axis] for axis in apart)
        spec = PartitionSpec(apart, *_spec(path, roles.gradients))
        return jax.ShapeDtypeStruct(
            (count, *leaf.shape), jnp.float32, sharding=NamedSharding(mesh, spec)
        )

    return map_leaves(one, params)


def hierarchical_gradients(
    how: Hierarchy,
    objective: Objective,
    apply: Apply,
    ours: Any,
    others: Any,
    micro: Mapping[str, Any],
    rng: Array,
    frozen: Any = None,
    feedback: Any = None,
) -> tuple[Any, Metrics, Any]:
    """Gradients, where the optimizer state lies, metrics, and the next feedback.

    Each device's part of each micro-batch is weighted by its targets, which gives loss and metrics
    of the whole batch, but for those that are no mean over targets. Devices draw dropout of their
    own. Raises `ValueError` for an objective with its own gradients.
    """
    if objective.gradients is not None:
        raise ValueError(
            "this objective takes its own gradients, which sharding.gather, reduce, secondary and "
            "error_feedback cannot: leave them out"
        )
    batch = how.layout.batch_axes
    trained, fixed = (map_leaves(lambda path, _: _master(how, path), t) for t in (ours, others))
    residuals = _residual_specs(how, feedback)
    every = PartitionSpec()

    def local(ours: Any, others: Any, micro: Any, rng: Array, frozen: Any, feedback: Any) -> Any:
        weights, others = (map_leaves(_updated(how), tree) for tree in (ours, others))
        rng = jax.random.fold_in(rng, jax.lax.axis_index(batch))

        def run(params: Any, batch: Any, rng: Array | None) -> Any:
            return apply(map_leaves(_used(how), merge(params, others)), batch, rng)

        sums, metrics = _summed(how, objective, run, weights, micro, rng, frozen)
        return *_finished(how, sums, feedback), metrics

    gradients, feedback, metrics = jax.shard_map(
        local,
        mesh=how.layout.mesh,
        in_specs=(trained, fixed, PartitionSpec(None, batch), every, every, residuals),
        out_specs=(trained, residuals, every),
        axis_names=set(batch),
        check_vma=False,
    )(ours, others, dict(micro), rng, frozen, feedback)
    return gradients, metrics, feedback


def _updated(how: Hierarchy) -> Callable[[str, Array], Array]:
    """A master's part -> the part that a weight has, once a step."""

    def one(path: str, master: Array) -> Array:
        roles = how.roles.get(path)
        if roles is None or not any(roles.in_update):
            return master
        weight = _by_layer(path, lambda x: gather(x, roles.in_update, roles.gather), master)
        return weight if roles.gather.precision == "float32" else weight.astype(jnp.bfloat16)

    return one


def _used(how: Hierarchy) -> Callable[[str, Array], Any]:
    """What `apply` gets in place of a weight's part: a matrix that is gathered where it is
    multiplied, or the whole array.
    """

    def one(path: str, weight: Array) -> Any:
        roles = how.roles.get(path)
        if roles is None or not any(roles.weights):
            return weight
        if how.formats and len(roles.weights) == 2:
            return Gathered(weight, roles, how.again)
        return _by_layer(path, lambda x: weight_of(x, roles), weight)

    return one


def _summed(
    how: Hierarchy,
    objective: Objective,
    apply: Apply,
    weights: Any,
    micro: Mapping[str, Any],
    rng: Array,
    frozen: Any,
) -> tuple[Any, Metrics]:
    """Sums over micro-batches of this device's gradients, reduced as far as their table says, and
    metrics of all devices.
    """
    targets = jax.vmap(objective.weight)(micro)
    batch = how.layout.batch_axes
    total = jax.lax.psum(jnp.sum(targets), batch)
    shares = targets / jnp.maximum(total, 1e-8)

    def reduce(path: str, gradient: Array) -> Array:
        roles = how.roles.get(path)
        if roles is None or not any(roles.in_backward):
            return gradient.astype(jnp.float32)
        return _by_layer(path, lambda x: scatter(x, roles.in_backward, roles.reduce), gradient)

    def one(share: Array, batch: Any, rng: Array) -> tuple[Any, Metrics]:
        gradients, metrics = micro_gradients(objective, apply, weights, batch, rng, frozen, share)
        return map_leaves(reduce, gradients), jax.tree.map(lambda value: share * value, metrics)

    def body(sums: Any, piece: tuple[Array, Any, Array]) -> tuple[Any, Metrics]:
        share, batch, index = piece
        gradients, metrics = one(share, batch, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, sums, gradients), metrics

    pieces = (shares, dict(micro), jnp.arange(len(shares)))
    shapes, _ = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], pieces[:2]), rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, metrics = jax.lax.scan(body, zeros, pieces)
    metrics = jax.lax.psum(jax.tree.map(jnp.sum, metrics), batch)
    return sums, {**metrics, "tokens": total}


def _finished(how: Hierarchy, sums: Any, feedback: Any) -> tuple[Any, Any]:
    """Gradients where the optimizer state lies, and the next feedback: what is left to do once a
    step.
    """
    residuals = flatten(feedback) if feedback is not None else {}

    def one(path: str, gradient: Array) -> Array:
        roles = how.roles.get(path)
        if roles is not None and any(roles.in_step):
            given = (residuals[path][0],) if path in residuals else ()
            gradient, left = _by_layer(
                path,
                lambda *x: scatter_once(x[0], roles.in_step, roles.reduce, *x[1:]),
                gradient,
                *given,
            )
            if given:
                residuals[path] = left[None]
        return jax.lax.psum(gradient, _outside(how, () if roles is None else roles.optimizer))

    gradients = map_leaves(one, sums)
    return gradients, None if feedback is None else map_leaves(lambda p, _: residuals[p], feedback)


def _master(how: Hierarchy, path: str) -> PartitionSpec:
    roles = how.roles.get(path)
    return PartitionSpec() if roles is None else _spec(path, roles.optimizer)


def _residual_specs(how: Hierarchy, feedback: Any) -> Any:
    def one(path: str, _: Any) -> PartitionSpec:
        split = how.roles[path].gradients
        return PartitionSpec(_outside(how, split), *_spec(path, split))

    return map_leaves(one, feedback)


def _spec(path: str, dims: Dims) -> PartitionSpec:
    lead = (None,) if STACKED.fullmatch(path) else ()
    return PartitionSpec(*lead, *(axes or None for axes in dims))


def _outside(how: Hierarchy, dims: Dims) -> tuple[str, ...]:
    """Axes that split the batch but not an array."""
    split = {axis for axes in dims for axis in axes}
    return tuple(axis for axis in how.layout.batch_axes if axis not in split)


def _by_layer(path: str, function: Callable[..., Any], *arrays: Array) -> Any:
    """A function of one layer's arrays, on those of a stack."""
    return (jax.vmap(function) if STACKED.fullmatch(path) else function)(*arrays)
