"""Gradients of a batch, micro-batch by micro-batch, each weighted by its own number of targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from training.objectives import Apply, Metrics, Objective

Array = jax.Array


def batch_gradients(
    objective: Objective,
    apply: Apply,
    params: Any,
    micro: Mapping[str, Any],
    rng: Array,
    frozen: Any = None,
    shardings: Any = None,
) -> tuple[Any, Metrics]:
    """Gradient and metrics of a batch cut into micro-batches `[accumulation, micro, ...]`.

    With weights w_i the loss is sum w_i loss_i / sum w_i, exactly that of one large batch. Metrics
    are averaged the same way; `tokens` is sum w_i and `objective` the minimised value.
    """
    weights = jax.vmap(objective.weight)(micro)
    total = jnp.sum(weights)
    shares = weights / jnp.maximum(total, 1e-8)

    def one(share: Array, batch: Any, rng: Array) -> tuple[Any, Metrics]:
        gradients, metrics = micro_gradients(objective, apply, params, batch, rng, frozen, share)
        return _constrain(gradients, shardings), metrics

    count = weights.shape[0]
    if count == 1:
        gradients, metrics = one(jnp.float32(1), jax.tree.map(lambda x: x[0], micro), rng)
        return gradients, {**metrics, "tokens": total}

    def body(sums: Any, piece: tuple[Array, Any, Array]) -> tuple[Any, Metrics]:
        share, batch, index = piece
        gradients, metrics = one(share, batch, jax.random.fold_in(rng, index))
        sums = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), sums, gradients)
        return sums, jax.tree.map(lambda value: share * value, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    gradients, metrics = jax.lax.scan(
        body, _constrain(zeros, shardings), (shares, micro, jnp.arange(count))
    )
    return gradients, {**jax.tree.map(jnp.sum, metrics), "tokens": total}


def micro_gradients(
    objective: Objective,
    apply: Apply,
    params: Any,
    batch: Any,
    rng: Array,
    frozen: Any,
    share: Array,
) -> tuple[Any, Metrics]:
    """Gradients times `share`, and metrics with `loss` and `objective`."""
    if objective.gradients is not None:
        gradients, metrics = objective.gradients(apply, params, batch, rng, frozen=frozen)
        gradients = jax.tree.map(lambda g: share * g, gradients)
        return gradients, {"objective": metrics["loss"], **metrics}

    def value(params: Any) -> tuple[Array, Metrics]:
        loss, metrics = objective.loss(apply, params, batch, rng, frozen=frozen)
        if jnp.shape(loss) != ():
            raise ValueError(
                f"the objective's loss has shape {jnp.shape(loss)}: "
                "it must be one scalar, the mean over targets"
            )
        return share * loss, {"loss": loss, **metrics, "objective": loss}

    (_, metrics), gradients = jax.value_and_grad(value, has_aux=True)(params)
    return gradients, metrics


def _constrain(gradients: Any, shardings: Any) -> Any:
    if shardings is None:
        return gradients
    return jax.tree.map(jax.lax.with_sharding_constraint, gradients, shardings)
