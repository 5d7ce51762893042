"""What a run minimises (seam 4): a loss over a batch, and how much that batch weighs.

`loss(apply, params, batch, rng, frozen=None) -> (scalar mean, metrics)`, where `apply(params,
batch, rng)` gives `(logits, aux)`. `weight(batch)` is the number of targets that the mean ran over;
the step uses it so that a batch cut into micro-batches gives the loss and gradient of the whole
one. A new kind of run is three functions: see `three_functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from training.chunked_loss import head_cross_entropy
from training.cross_entropy import token_cross_entropy

Array = jax.Array
Batch = Mapping[str, Any]
Metrics = dict[str, Array]
Apply = Callable[[Any, Batch, Array | None], tuple[Any, Mapping[str, Any]]]
"""`(params, batch, key for dropout, or None for none) -> (logits, aux)`."""


def count_targets(batch: Batch) -> Array:
    """Targets in a batch, float32: the sum of `loss_mask`, or the rows where there is none."""
    if "loss_mask" in batch:
        return jnp.sum(batch["loss_mask"], dtype=jnp.float32)
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


@dataclass(frozen=True)
class Objective:
    """The functions that make a kind of run.

    loss: `(apply, params, batch, rng, frozen=None) -> (float32[], metrics)`, mean over targets.
    weight: `batch -> float32[]`, the number of targets that it is a mean over.
    gradients: `(apply, params, batch, rng, frozen=None) -> (tree like params, metrics)`, for a
        method whose gradient is not that of `loss` (private, zeroth-order, quantized); the metrics
        hold `loss`.
    predict: `(apply, params, batch, rng) -> arrays [batch, ...]`.
    batch: `rows -> arrays [batch, ...]`, where rows are not batches already.

    `params` are the leaves that train; `frozen` is what references or teachers the run carries.
    """

    loss: Callable[..., tuple[Array, Metrics]]
    weight: Callable[[Batch], Array] = count_targets
    gradients: Callable[..., tuple[Any, Metrics]] | None = None
    predict: Callable[[Apply, Any, Batch, Array], Any] | None = None
    batch: Callable[[Any], Batch] | None = None


def masked_mean(values: Array, mask: Array | None) -> Array:
    """`sum(values * mask) / sum(mask)` in float32; 0 where the mask is all zero."""
    if mask is None:
        return jnp.mean(values, dtype=jnp.float32)
    mask = mask.astype(jnp.float32)
    return jnp.sum(jnp.where(mask > 0, values, 0) * mask) / jnp.maximum(jnp.sum(mask), 1e-8)


def language_model(
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    auxiliary: tuple[tuple[str, float], ...] = (),
    chunk: int | None = None,
    report: tuple[str, ...] = (),
) -> Objective:
    """Next-token cross entropy over `targets` where `loss_mask` is not 0, in nats per token.

    z_loss: coefficient of mean(log Z ^ 2), Z the softmax normaliser (PaLM, section 5).
    label_smoothing: share of the target distribution that is uniform over the vocabulary.
    auxiliary: (name, coefficient) of what layers report in `aux`, summed over layers.
    chunk: tokens of a device whose logits exist at one time, for an `apply` that gives its head
        apart (`training.decoders`); None or 0 is all.
    report: names of what layers report in `aux`, to be logged.

    Metrics: `loss` (cross entropy alone), `accuracy`, `log_z`, each auxiliary loss, and of each
    name of `report` the mean over layers, or, of a vector, the extremes as `NAME_min`, `NAME_max`.
    """

    def loss(apply: Apply, params: Any, batch: Batch, rng: Array, frozen: Any = None):
        outputs, aux = apply(params, batch, rng)
        mask = batch.get("loss_mask")
        if "head" in aux:
            entropy = head_cross_entropy(
                aux["head"], outputs, batch["targets"], label_smoothing, chunk
            )
        else:
            entropy = token_cross_entropy(outputs, batch["targets"], label_smoothing)
        metrics = {
            "loss": masked_mean(entropy.loss, mask),
            "accuracy": masked_mean(entropy.correct, mask),
            "log_z": masked_mean(entropy.log_z, mask),
        }
        total = metrics["loss"]
        if z_loss:
            total = total + z_loss * masked_mean(jnp.square(entropy.log_z), mask)
        extra, named = _auxiliary(aux, auxiliary)
        return total + extra, {**metrics, **_reported(aux, report), **named}

    return Objective(loss=loss, predict=_predict_tokens)


def classification(label_smoothing: float = 0.0) -> Objective:
    """Cross entropy of `labels int32[batch]` under logits `[batch, classes]`; `loss_mask [batch]`
    is optional.

    Metrics: `loss` (nats per example), `accuracy`.
    """

    def loss(apply: Apply, params: Any, batch: Batch, rng: Array, frozen: Any = None):
        logits, _ = apply(params, batch, rng)
        entropy = token_cross_entropy(logits, batch["labels"], label_smoothing)
        mask = batch.get("loss_mask")
        mean = masked_mean(entropy.loss, mask)
        return mean, {"loss": mean, "accuracy": masked_mean(entropy.correct, mask)}

    def predict(apply: Apply, params: Any, batch: Batch, rng: Array) -> Array:
        return jax.nn.softmax(apply(params, batch, rng)[0].astype(jnp.float32), axis=-1)

    return Objective(loss=loss, predict=predict)


def three_functions(
    batch: Callable[[Any], Batch],
    loss: Callable[..., tuple[Array, Metrics]],
    predict: Callable[[Apply, Any, Batch, Array], Any] | None = None,
    weight: Callable[[Batch], Array] = count_targets,
) -> Objective:
    """A new kind of run from `batch(rows)`, `loss(apply, params, batch, rng)` and `predict(...)`
    (RedCoast).

    `loss` gives a scalar mean over what `weight(batch)` counts (rows, if the batch has no
    `loss_mask`) and a dict of scalar metrics. The loop owns sharding, accumulation, precision,
    checkpoints and random keys. A run with `frozen` references hands them on as `frozen=`.
    """

    def with_frozen(apply: Apply, params: Any, batch: Batch, rng: Array, frozen: Any = None):
        given = {} if frozen is None else {"frozen": frozen}
        return loss(apply, params, batch, rng, **given)

    return Objective(loss=with_frozen, weight=weight, predict=predict, batch=batch)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "language_model": language_model,
    "classification": classification,
}
"""Objective name -> builder; the builder's keywords are the objective's settings."""


def _auxiliary(
    aux: Mapping[str, Any], coefficients: tuple[tuple[str, float], ...]
) -> tuple[Array, Metrics]:
    """The weighted sum of the auxiliary losses, and each by name; `[layers]` ones are summed."""
    total, named = jnp.float32(0), {}
    for name, coefficient in coefficients:
        named[name] = jnp.sum(_given(aux, name, "auxiliary loss"), dtype=jnp.float32)
        total = total + coefficient * named[name]
    return total, named


def _reported(aux: Mapping[str, Any], names: tuple[str, ...]) -> Metrics:
    """Scalar metrics of what layers report, `[layers]` or `[layers, n]`."""
    metrics = {}
    for name in names:
        value = jnp.asarray(_given(aux, name, "report"), jnp.float32)
        if value.ndim < 2:
            metrics[name] = jnp.mean(value)
        else:
            metrics[f"{name}_min"], metrics[f"{name}_max"] = jnp.min(value), jnp.max(value)
    return metrics


def _given(aux: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in aux:
        raise ValueError(
            f"the objective asks for the {kind} {name!r}, which the model does not give; "
            f"it gives {', '.join(sorted(set(aux) - {'head'})) or 'none'}"
        )
    return aux[name]


def _predict_tokens(apply: Apply, params: Any, batch: Batch, rng: Array) -> dict[str, Array]:
    """`token int32[batch, length]`, the likeliest next one, and `log_probability` of the targets,
    float32."""
    outputs, aux = apply(params, batch, rng)
    logits = aux["head"](outputs) if "head" in aux else outputs
    return {
        "token": jnp.argmax(logits, axis=-1),
        "log_probability": -token_cross_entropy(logits, batch["targets"]).loss,
    }
