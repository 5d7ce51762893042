"""Cross entropy that never holds a one-hot array or a float32 copy of the logits.

The gradient, softmax(logits) - onehot(target), is one fused pass, because what the loss needs of
the logits has its own derivative rule. All of it stays local where the vocabulary is sharded.
`training.chunked_loss` runs the head itself a few tokens at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Entropy(NamedTuple):
    """Per token, all float32 in the targets' shape."""

    loss: Array
    """Nats."""
    log_z: Array
    """Log of the softmax normaliser."""
    correct: Array
    """1 if the target has the largest logit; 1/n if n logits share that place."""


@jax.custom_jvp
def logit_statistics(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """`(log sum exp, target's logit, mean logit)` over the vocabulary, float32."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1)).astype(jnp.float32)
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    total = jnp.sum(jnp.exp(logits.astype(jnp.float32) - peak[..., None]), axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return peak + jnp.log(total), chosen, jnp.mean(logits, axis=-1, dtype=jnp.float32)


@logit_statistics.defjvp
def _logit_statistics_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (logits, targets), direction = primals, tangents[0].astype(jnp.float32)
    log_z, chosen, mean = logit_statistics(logits, targets)
    softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    return (log_z, chosen, mean), (
        jnp.sum(softmax * direction, axis=-1),
        jnp.sum(jnp.where(_is_target(logits, targets), direction, 0), axis=-1),
        jnp.mean(direction, axis=-1),
    )


def _is_target(logits: Array, targets: Array) -> Array:
    return jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]


def token_cross_entropy(logits: Array, targets: Array, label_smoothing: float = 0.0) -> Entropy:
    """`[..., vocab], int32[...] -> Entropy` of float32 `[...]`.

    With smoothing e the target distribution is (1 - e) onehot + e / vocab, as in torch.
    """
    log_z, chosen, mean = logit_statistics(logits, targets)
    loss = log_z - chosen
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - mean)
    return Entropy(loss, log_z, _share_of_first_place(logits, chosen))


def _share_of_first_place(logits: Array, chosen: Array) -> Array:
    """Accuracy under random choice among equals, so a head of zeros scores 1/vocab and not 1."""
    logits, chosen = jax.lax.stop_gradient((logits, chosen))
    peak = jnp.max(logits, axis=-1)
    # Signs are -1 below the peak and 0 at it; a CPU adds them four times faster than comparisons.
    ties = logits.shape[-1] + jnp.sum(
        jnp.sign(logits - peak[..., None]), axis=-1, dtype=jnp.float32
    )
    return jnp.where(chosen >= peak, 1 / jnp.maximum(ties, 1), 0)
