"""Gradients of a step whose layers lie on pipeline stages: as `training.step.batch_gradients`.

A step's micro-batches are what goes through the pipeline, so `train.accumulation` keeps its
meaning: random keys, the weight of each micro-batch and what mixtures report are those of a step
without stages. The objective runs outside the stages, on the outputs of one micro-batch at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sharding import (
    Layout,
    Pipeline,
    Schedule,
    alternate,
    chunks_of,
    circulate,
    constrain,
    gpipe,
    outside_stages,
)
from training.objectives import Metrics, Objective
from training.trainable import merge

Array = jax.Array
Batch = Mapping[str, Any]
STAGE = "stage"
HIDDEN = ("batch", "length", "hidden")


@dataclasses.dataclass(frozen=True)
class Staged:
    """A model in parts, which together are its `apply`.

    layers: how many.
    stack: `params -> arrays [layers, …]`; rest: `params -> params` without them.
    join: `(rest, stack) -> params`.
    enter: `(rest, batch, rng, layout) -> x [batch, length, d_model]`.
    run: `(chunk of the stack, x, first layer, batch, rng, layout, count) -> (x, aux {name: [layers
        of the chunk, …]})`; only the first `count` layers of the chunk count, all without it.
    leave: `(rest, x, layout) -> outputs`.
    """

    layers: int
    stack: Callable[[Any], Any]
    rest: Callable[[Any], Any]
    join: Callable[[Any, Any], Any]
    enter: Callable[..., Array]
    run: Callable[..., tuple[Array, dict[str, Array]]]
    leave: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class StagedStep:
    """A model, the schedule that its micro-batches follow, the mesh, the layers of each stage
    (empty: equal parts), and whether each stage runs embedding, head and loss itself.
    """

    model: Staged
    schedule: Schedule
    layout: Layout
    layers: tuple[int, ...] = ()
    repeated: bool = False

    @property
    def outside(self) -> Layout:
        """The layout of what runs outside the stages."""
        return self.layout if self.repeated else outside_stages(self.layout)

    def pipeline(self, sides: _Sides) -> Pipeline:
        """What runs between the sides. Stages of unequal layers branch, but for sequences that are
        split: their ring of keys is one exchange for all devices, which none may leave out.
        """
        branches = bool(self.layers) and self.layout.size("length") == 1
        return Pipeline(sides.stage, self.schedule, self.layout, self.repeated, branches)

    def chunks(self, stack: Any) -> Any:
        """Arrays `[layers, …]` as the stages run them (`chunks_of`)."""
        return chunks_of(stack, self.schedule, self.layout, self.layers)

    @property
    def chunk(self) -> int:
        """Layers of a chunk, those that only fill it up included."""
        equal = self.model.layers // (self.schedule.stages * self.schedule.repeats)
        return max(self.layers, default=equal)

    def part(self, number: Any) -> tuple[Any, Any]:
        """`(first layer, how many)` of a chunk; None for as many as it holds."""
        if not self.layers:
            return number * self.chunk, None
        first = np.cumsum((0, *self.layers[:-1]))
        return jnp.asarray(first)[number], jnp.asarray(self.layers)[number]


class _Given:
    """Stands for the params in an objective, which may only hand them to `apply`: what the model
    makes of them is there already.
    """


def staged_gradients(
    step: StagedStep,
    objective: Objective,
    ours: Any,
    others: Any,
    micro: Batch,
    rng: Array,
    frozen: Any = None,
    shardings: Any = None,
) -> tuple[Any, Metrics]:
    """Gradient and metrics of micro-batches `[m, micro, …]` over the stages.

    `ours` and `others` are what `split_trainable` gives. Values are those of `batch_gradients`.
    Raises `ValueError` for an objective that has a gradient of its own, or that runs the model
    otherwise than once on the params that train.
    """
    if objective.gradients is not None:
        raise ValueError("an objective with its own gradients needs mesh.stage=1")
    weights = jax.vmap(objective.weight)(micro)
    shares = weights / jnp.maximum(jnp.sum(weights), 1e-8)
    count = weights.shape[0]
    keys = jax.vmap(lambda index: jax.random.fold_in(rng, index))(jnp.arange(count))
    keys = rng[None] if count == 1 else keys
    passed = (dict(micro), keys, shares if count > 1 else jnp.ones(1))
    sides = _sides(step, objective, ours, others, passed, frozen)
    run = _alternately if step.schedule.first_first else _forward_first
    gradients, metrics = run(step, sides, ours, others, passed)
    if shardings is not None:
        gradients = jax.tree.map(jax.lax.with_sharding_constraint, gradients, shardings)
    return gradients, {**jax.tree.map(jnp.sum, metrics), "tokens": jnp.sum(weights)}


def staged_metrics(
    step: StagedStep, objective: Objective, params: Any, micro: Batch, frozen: Any = None
) -> Metrics:
    """Metrics of micro-batches `[m, micro, …]` without dropout, each times its targets, and summed;
    `tokens` are the targets. For evaluation: nothing goes backward.
    """
    schedule = step.schedule
    order = gpipe(schedule.stages, schedule.micro_batches, schedule.repeats)
    step = dataclasses.replace(step, schedule=order)
    weights = jax.vmap(objective.weight)(micro)
    passed, others = (dict(micro), None, weights), jax.tree.map(lambda leaf: None, params)
    sides = _sides(step, objective, params, others, passed, frozen)
    metrics = _forward(step, sides, params, others, passed)[1]
    sums = {name: jnp.sum(value) for name, value in metrics.items() if name != "objective"}
    return {**sums, "tokens": jnp.sum(weights)}


@dataclasses.dataclass(frozen=True)
class _Sides:
    """What stands around the stages: `enter(rest, passed) -> message`, `leave(rest, message,
    passed) -> (share of the loss, metrics times the share)`; and the stages' own function.
    """

    enter: Callable[[Any, Any], Any]
    stage: Callable[..., Any]
    leave: Callable[[Any, Any, Any], tuple[Array, Metrics]]


def _sides(
    step: StagedStep, objective: Objective, ours: Any, others: Any, passed: Any, frozen: Any
) -> _Sides:
    """A message is the residual stream and what all layers report, each stage filling in its own.

    `rest` are the trained arrays outside the stages, `passed` is `(batch, key, share)` of one
    micro-batch.
    """
    model, layout, outside = step.model, step.layout, step.outside
    rows = model.layers + step.chunk - min(step.layers, default=step.chunk)
    fixed = model.rest(others)

    def start(rest: Any, passed: Any) -> Array:
        return model.enter(merge(rest, fixed), passed[0], passed[1], outside)

    def run(chunk: Any, others: Any, x: Array, passed: Any, number: Any) -> Any:
        first, count = step.part(number)
        return model.run(merge(chunk, others), x, first, passed[0], passed[1], layout, count)

    def report(x: Any, passed: Any) -> dict[str, jax.ShapeDtypeStruct]:
        cut = [jax.tree.map(lambda a: a[: step.chunk], model.stack(t)) for t in (ours, others)]
        return run(cut[0], cut[1], x, passed, 0)[1]

    first = jax.tree.map(lambda a: a[0], passed)
    x = jax.eval_shape(start, model.rest(ours), first)
    shapes = jax.eval_shape(report, x, first)

    def enter(rest: Any, passed: Any) -> Any:
        empty = {k: jnp.zeros((rows, *a.shape[1:]), a.dtype) for k, a in shapes.items()}
        return start(rest, passed), empty

    def stage(chunk: Any, others: Any, message: Any, passed: Any, number: Array) -> Any:
        x, aux = message
        x, found = run(chunk, others, x, passed, number)
        first, _ = step.part(number)  # what fills a chunk up, the next stage writes over
        filled = {
            name: jax.lax.dynamic_update_slice_in_dim(aux[name], value, first, 0)
            for name, value in found.items()
        }
        return x, filled

    def leave(rest: Any, message: Any, passed: Any) -> tuple[Array, Metrics]:
        (x, aux), (batch, rng, share), given = message, passed, _Given()
        aux = {name: value[: model.layers] for name, value in aux.items()}
        whole = merge(rest, fixed)

        def apply(params: Any, of_batch: Any, key: Any) -> Any:
            if params is not given:
                raise ValueError(
                    "this objective runs the model on other params than those that train, which a "
                    "pipeline cannot: use mesh.stage=1"
                )
            return model.leave(whole, constrain(x, HIDDEN, outside), outside), aux

        rng = jax.random.key(0) if rng is None else rng
        loss, metrics = objective.loss(apply, given, batch, rng, frozen=frozen)
        metrics = {"loss": loss, **metrics, "objective": loss}
        return share * loss, jax.tree.map(lambda value: share * value, metrics)

    sides = _Sides(enter, stage, leave)
    return _on_every_stage(sides, step.schedule.stages) if step.repeated else sides


def _on_every_stage(sides: _Sides, stages: int) -> _Sides:
    """The same, run by every stage with its own copy of `rest` (`_copies`); of what they make of
    the loss, that of the last stage counts.
    """

    def enter(rest: Any, passed: Any) -> Any:
        return jax.vmap(lambda rest: sides.enter(rest, passed), spmd_axis_name=STAGE)(rest)

    def leave(rest: Any, messages: Any, passed: Any) -> tuple[Array, Metrics]:
        run = jax.vmap(
            lambda rest, message: sides.leave(rest, message, passed), spmd_axis_name=STAGE
        )
        last = jnp.arange(stages) == stages - 1
        return jax.tree.map(
            lambda x: jnp.sum(jnp.where(last.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), axis=0),
            run(rest, messages),
        )

    return _Sides(enter, sides.stage, leave)


def _copies(step: StagedStep, rest: Any) -> Any:
    """`rest` as the sides read it: of a `repeated` step one copy a stage, `[p, …]`."""
    if not step.repeated:
        return rest

    def copy(x: Array) -> Array:
        free = [PartitionSpec.UNCONSTRAINED] * x.ndim
        where = NamedSharding(step.layout.mesh, PartitionSpec(STAGE, *free))
        copies = jnp.broadcast_to(x, (step.schedule.stages, *x.shape))
        return jax.lax.with_sharding_constraint(copies, where)

    return jax.tree.map(copy, rest)


def _forward_first(
    step: StagedStep, sides: _Sides, ours: Any, others: Any, passed: Any
) -> tuple[Any, Metrics]:
    """All forward, then all backward: the gradient of the whole forward pass."""

    def value(ours: Any) -> tuple[Array, Metrics]:
        return _forward(step, sides, ours, others, passed)

    (_, metrics), gradients = jax.value_and_grad(value, has_aux=True)(ours)
    return gradients, metrics


def _forward(
    step: StagedStep, sides: _Sides, ours: Any, others: Any, passed: Any
) -> tuple[Array, Metrics]:
    """The sum of the shares of the loss, and the metrics of each micro-batch `[m]`."""
    model = step.model
    chunks, fixed = (step.chunks(model.stack(tree)) for tree in (ours, others))
    rest = _copies(step, model.rest(ours))

    def leaving(message: Any) -> Any:
        return constrain(message[0], HIDDEN, step.outside), message[1]

    @jax.checkpoint
    def leave(piece: Any) -> tuple[Array, Metrics]:
        return sides.leave(rest, *piece)

    messages = jax.vmap(lambda one: sides.enter(rest, one))(passed)
    leaving = jax.vmap(leaving, spmd_axis_name=STAGE) if step.repeated else leaving
    messages = circulate(step.pipeline(sides), chunks, fixed, passed, messages, leaving)
    losses, metrics = jax.lax.map(leave, (messages, passed))
    return jnp.sum(losses), metrics


def _alternately(
    step: StagedStep, sides: _Sides, ours: Any, others: Any, passed: Any
) -> tuple[Any, Metrics]:
    """Each micro-batch back as soon as it has gone forward (1F1B)."""
    chunks, fixed = (step.chunks(step.model.stack(tree)) for tree in (ours, others))
    of_chunks, of_rest, metrics = alternate(
        step.pipeline(sides),
        chunks,
        fixed,
        _copies(step, step.model.rest(ours)),
        passed,
        sides.enter,
        sides.leave,
    )
    if step.repeated:
        of_rest = jax.tree.map(lambda x: jnp.sum(x, axis=0), of_rest)
    stored = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), step.model.stack(ours)
    )
    (stack,) = jax.linear_transpose(step.chunks, stored)(of_chunks)
    return step.model.join(of_rest, stack), metrics
