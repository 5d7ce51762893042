"""What every kernel computes between its two matrix products: `reference.attention`'s scores and
mask, in the form that kernels share.

Exponents are in base 2, which is what the hardware has: `exp(s) = 2^(s log2 e)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array

LOG2E = math.log2(math.e)
NOTHING = -1e30
"""Logit of a hidden key: finite, so that rows that see nothing make no NaN."""


@dataclass(frozen=True)
class Rules:
    """What changes a score or hides it, as far as it is known before tracing.

    causal, window, sinks, soft_cap: as in `reference.attention`.
    scale: multiplies `q . k`.
    alibi: slopes are given.
    segments: some tokens are padding or belong to different documents.
    """

    causal: bool
    window: int | None
    sinks: int
    soft_cap: float | None
    scale: float
    alibi: bool
    segments: bool


def logits(
    rules: Rules, scores: Array, distance: Array | None, slope: Array
) -> tuple[Array, Array | None]:
    """Base-2 logits of the scores `q . k`, and with a soft cap the derivative of the cap.

    distance: query position minus key position, where there are slopes.
    """
    if not rules.alibi and rules.soft_cap is None:
        return scores * (rules.scale * LOG2E), None
    scores = scores * rules.scale
    if rules.alibi:
        assert distance is not None
        scores -= slope * jnp.abs(distance).astype(jnp.float32)
    if rules.soft_cap is None:
        return scores * LOG2E, None
    bounded = jnp.tanh(scores * (1 / rules.soft_cap))
    return bounded * (rules.soft_cap * LOG2E), 1 - bounded * bounded


def visible(rules: Rules, distance: Array, key_positions: Array, same: Array) -> Array:
    """What may be seen; same: the two tokens are of one document."""
    seen = distance >= 0 if rules.causal else None
    if rules.window is not None:
        near = (distance if rules.causal else jnp.abs(distance)) < rules.window
        if rules.sinks:
            near |= key_positions < rules.sinks
        seen = near if seen is None else seen & near
    if seen is None:
        return same
    return seen & same if rules.segments else seen
