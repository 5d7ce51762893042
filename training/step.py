"""One training step, compiled: gradients over micro-batches, clipping, update, average, metrics.

An update from a loss or gradient that is not finite is refused inside the step, so it is never
applied and nothing has to be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from training.averaging import update_average
from training.gradients import batch_gradients
from training.hierarchical import Hierarchy, hierarchical_gradients
from training.objectives import Apply, Metrics, Objective
from training.schedules import Schedule
from training.spike_guard import remember, robust_score
from training.staged import StagedStep, staged_gradients
from training.state import Placement, TrainState
from training.trainable import Predicate, everything, merge, split_trainable

Array = jax.Array
Step = Callable[..., tuple[TrainState, Metrics]]
Updated = tuple[Any, Any, Any]
"""What an update changes: (trainable parameters, optimizer state, average)."""
NONFINITE = ("skip", "propagate")


def make_step(
    objective: Objective,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    accumulation: int = 1,
    clip_norm: float | None = None,
    trainable: Predicate = everything,
    ema_decay: float | None = None,
    nonfinite: str = "skip",
    spike_z: float | None = None,
    placement: Placement | None = None,
    staged: StagedStep | None = None,
    hierarchy: Hierarchy | None = None,
) -> Step:
    """Jitted `step(state, batch, frozen=None) -> (state, metrics)`; the state given is donated.

    The batch's arrays are `[batch, ...]`; with accumulation they are cut into as many
    micro-batches, each weighted by its own number of targets, which gives the loss and gradient of
    the whole. Metrics, float32 scalars: all of the objective's, `loss`, `tokens` (targets),
    `learning_rate`, `grad_norm` (before clipping), `update_norm`, `param_norm` (after the update),
    `nonfinite` (1 if this step was not finite). With `spike_z` an update whose loss has a robust
    score above it is refused too, and `spike` is 1; the state must have been made with a window.
    With `staged` the micro-batches go through pipeline stages, and `apply` is not called. With
    `hierarchy` the step places its own collectives; its `placement` must be of the same layout.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite is {nonfinite!r}: give one of {', '.join(NONFINITE)}")
    if accumulation < 1:
        raise ValueError(f"accumulation is {accumulation}: it must be at least 1")

    take = _taker(objective, apply, placement, staged, hierarchy)

    def step(
        state: TrainState, batch: Mapping[str, Any], frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        ours, others = split_trainable(state.params, trainable)
        micro = micro_batches(batch, accumulation, placement)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        gradients, metrics, feedback = take(ours, others, micro, key, frozen, state.feedback)
        rate, grad_norm = jnp.asarray(schedule(state.step), jnp.float32), global_norm(gradients)
        finite = jnp.isfinite(metrics.pop("objective")) & jnp.isfinite(grad_norm)

        def update(old: Updated) -> tuple[Updated, Array]:
            scaled = gradients if clip_norm is None else clip(gradients, grad_norm, clip_norm)
            return _update(optimizer, scaled, old, rate, ema_decay)

        old = (ours, state.opt_state, state.ema)
        accepted, losses = finite if nonfinite == "skip" else None, state.losses
        if spike_z is not None:
            loss = metrics["loss"]
            spike = finite & (robust_score(losses, loss) > spike_z)
            metrics["spike"] = spike.astype(jnp.float32)
            accepted = ~spike if accepted is None else accepted & ~spike
            losses = remember(losses, loss, accepted & finite, state.step - state.skipped)
        if accepted is None:
            new, update_norm = update(old)
        else:
            new, update_norm = jax.lax.cond(accepted, update, _refuse, old)
            feedback = jax.tree.map(partial(jnp.where, accepted), feedback, state.feedback)
        skipped = state.skipped + (0 if accepted is None else ~accepted)
        ours, opt_state, ema = new
        params = merge(ours, others)
        state = TrainState(
            params, opt_state, state.step + 1, skipped, state.rng, ema, losses, feedback
        )
        return state, {
            **metrics,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": global_norm(ours),
            "nonfinite": 1 - (finite & jnp.isfinite(update_norm)).astype(jnp.float32),
        }

    if hierarchy is not None and jax.default_backend() == "cpu":
        # Read back from the cache, XLA's CPU programs mix up collectives, which share a channel.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    shardings = None if placement is None else (placement.state, None)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _taker(
    objective: Objective,
    apply: Apply,
    placement: Placement | None,
    staged: StagedStep | None,
    hierarchy: Hierarchy | None,
) -> Callable[..., tuple[Any, Metrics, Any]]:
    """`take(ours, others, micro, key, frozen, feedback)`: gradients of a batch, metrics, and the
    next feedback, by whichever way the batch goes through the model.
    """
    shardings = None if placement is None else placement.gradients

    def take(
        ours: Any, others: Any, micro: Any, key: Array, frozen: Any, feedback: Any
    ) -> tuple[Any, Metrics, Any]:
        given = (ours, others, micro, key, frozen)
        if hierarchy is not None:
            return hierarchical_gradients(hierarchy, objective, apply, *given, feedback)
        if staged is not None:
            return *staged_gradients(staged, objective, *given, shardings), feedback

        def run(params: Any, batch: Any, rng: Array | None) -> Any:
            return apply(merge(params, others), batch, rng)

        found = batch_gradients(objective, run, ours, micro, key, frozen, shardings)
        return *found, feedback

    return take


def micro_batches(
    batch: Mapping[str, Any], accumulation: int, placement: Placement | None = None
) -> dict[str, Any]:
    """`[batch, ...] -> [accumulation, batch / accumulation, ...]` for every array.

    Micro-batch i holds rows i, i + accumulation, …: so each device cuts its own rows, and none
    moves.
    """
    spec = None
    if placement is not None:
        axes = tuple(placement.layout.spec(("batch",)))
        spec = (None, axes[0] if axes else None)

    def cut(x: Array) -> Array:
        rows = x.shape[0]
        if rows % accumulation:
            raise ValueError(
                f"a batch of {rows} rows can't be cut into {accumulation} equal micro-batches; "
                f"make the batch size a multiple of accumulation"
            )
        x = jnp.moveaxis(x.reshape(rows // accumulation, accumulation, *x.shape[1:]), 1, 0)
        if placement is None or spec is None or accumulation == 1:
            return x
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(placement.layout.mesh, PartitionSpec(*spec, *rest))
        )

    return jax.tree.map(cut, dict(batch))


def global_norm(tree: Any) -> Array:
    """Root of the sum of squares over all arrays, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def clip(gradients: Any, norm: Array, largest: float) -> Any:
    """Gradients of this global norm scaled down to `largest` if it is larger."""
    factor = jnp.minimum(1, largest / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda g: g * factor, gradients)


def _update(
    optimizer: optax.GradientTransformation,
    gradients: Any,
    old: Updated,
    rate: Array,
    ema_decay: float | None,
) -> tuple[Updated, Array]:
    """Parameters, optimizer state and average after an update, and the update's norm."""
    params, opt_state, ema = old
    direction, opt_state = optimizer.update(gradients, opt_state, params)
    params = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params, direction)
    if ema_decay is not None:
        ema = update_average(ema, params, ema_decay)
    return (params, opt_state, ema), rate * global_norm(direction)


def _refuse(old: Updated) -> tuple[Updated, Array]:
    """All as it was. A branch, since a select would copy every array to keep its old value."""
    return old, jnp.float32(0)
