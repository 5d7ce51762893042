"""How a kernel keeps its softmax in range: a running maximum, or one constant for all parts.

With the constant, partial sums over parts of the keys add up without rescaling (FlashDecoding++,
section 3). It is exact while nothing leaves the range of float32, so each row is checked and a row
out of range is computed again with the running maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unified:
    """Softmax with a constant in place of the maximum; rows out of its range fall back to "online".

    A row stays with the constant if `low <= lse - phi <= high`, where `lse` is its log-sum-exp
    over the keys of one call. With sums in float32, `exp` overflows at 88.7 and sums of values
    need some room, and everything vanishes below -87.3, hence the defaults.

    phi: float32[heads], the constant of each query head; the median of its rows' maxima is good.
    low, high: the range that is trusted.
    """

    phi: Array
    low: float = field(default=-60.0, metadata={"static": True})
    high: float = field(default=70.0, metadata={"static": True})


Softmax = str | Unified
"""The string "online", or `Unified`."""


def check_softmax(softmax: Any, heads: int) -> None:
    """Raises `ValueError` if it is neither "online" nor a `Unified` for that many heads."""
    if isinstance(softmax, Unified):
        if softmax.phi.shape != (heads,):
            raise ValueError(
                f"phi has shape {softmax.phi.shape}; expected one for each of {heads} query heads"
            )
        if not softmax.low < softmax.high:
            raise ValueError(f"Unified(low={softmax.low}, high={softmax.high}): low must be less")
    elif softmax != "online":
        raise ValueError(f'softmax={softmax!r}; it is "online" or Unified(phi, low, high)')


def fallen_rows(lse: Array, softmax: Unified) -> Array:
    """Which rows of a call fell back, `bool[..., heads]`, by its log-sum-exps (to their rounding).

    Rows that see nothing are not counted.
    """
    gap = lse - softmax.phi
    return ~((gap >= softmax.low) & (gap <= softmax.high)) & (lse != -jnp.inf)


def exponentials(
    scores: Array, visible: Array | None, softmax: Softmax, phi: Any
) -> tuple[Array, Array, Array]:
    """Softmax before its division, NaN-free for rows that see nothing.

    Args:
        scores: `float32[..., keys]`.
        visible: bool, broadcasts to scores; None sees everything.
        softmax: "online" or `Unified`.
        phi: its constants, `[..., 1]`.

    Returns:
        Weights `[..., keys]`, their sum `[..., 1]` (1 where nothing is seen), and the log-sum-exp
        `[..., 1]`.
    """
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shift = jnp.where(jnp.isfinite(peak), peak, 0.0)
    if isinstance(softmax, Unified):
        mass = jnp.sum(jnp.exp(jax.lax.stop_gradient(scores) - phi), axis=-1, keepdims=True)
        shift = jnp.where(in_range(mass, softmax), phi, shift)
    weights = jnp.exp(scores - shift)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = ~(total <= 0)  # a NaN is seen, and stays one
    safe = jnp.where(seen, total, 1.0)
    return weights, safe, jnp.where(seen, jnp.log(safe) + shift, -jnp.inf)


def in_range(mass: Array, softmax: Unified) -> Array:
    """Which rows the constant serves; `mass` is the sum of `exp(score - phi)`. NaN does not."""
    return (mass >= jnp.exp(jnp.float32(softmax.low))) & (
        mass <= jnp.exp(jnp.float32(softmax.high))
    )
