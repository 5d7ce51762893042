"""Refusing the update of a loss spike inside the compiled step (`faults.spike_action="skip"`).

The losses that a spike is measured against are part of the training state, so a resumed run refuses
the same updates as one that never stopped. The score is that of `training.faults.SpikeDetector`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from training.faults import LEAST_WINDOW

Array = jax.Array


def no_losses(window: int) -> Array:
    """`float32[window]` with nothing seen yet."""
    return jnp.full((window,), jnp.nan, jnp.float32)


def robust_score(losses: Array, loss: Array) -> Array:
    """`(loss - median) / (1.4826 MAD + 1e-6)` over the losses seen; 0 until there are enough."""
    center = jnp.nanmedian(losses)
    spread = jnp.nanmedian(jnp.abs(losses - center))
    enough = jnp.sum(jnp.isfinite(losses)) >= min(LEAST_WINDOW, losses.shape[0])
    return jnp.where(enough, (loss - center) / (1.4826 * spread + 1e-6), 0.0)


def remember(losses: Array, loss: Array, accepted: Array, count: Array) -> Array:
    """The window with the loss of accepted step number `count` in the place of its oldest one."""
    place = count % losses.shape[0]
    return losses.at[place].set(jnp.where(accepted, loss, losses[place]))
