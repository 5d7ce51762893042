"""Exponential moving average of the trainable parameters, updated inside the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def start_average(trainable: Any) -> Any:
    """The average before the first step: a copy of the parameters, in float32."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)


def update_average(average: Any, trainable: Any, decay: float) -> Any:
    """`decay * average + (1 - decay) * parameters`, leaf by leaf, float32."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p.astype(a.dtype) - a), average, trainable)
