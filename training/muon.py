"""Muon: momentum, each matrix of it made orthogonal (Jordan et al., 2024).

All leading axes (layers, experts) are a batch, so a stacked array is orthogonalised layer by layer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a x + b x^3 + c x^5, steep at 0: five rounds bring singular values to about 0.7-1.2."""


class MuonState(NamedTuple):
    """Momentum, a tree like params."""

    momentum: Any


def orthogonalise(matrix: Array, rounds: int = 5) -> Array:
    """Newton-Schulz: `[..., m, n]` with the same singular vectors, and singular values near 1.

    X <- a X + (b A + c A A) X with A = X X^T, from X / |X|, in float32; the shorter side comes
    first.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).astype(jnp.float32)
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.mT).astype(matrix.dtype)


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    update_rms: float | None = 0.2,
    moment_dtype: Any = jnp.float32,
    rounds: int = 5,
) -> optax.GradientTransformation:
    """Updates `scale * orthogonalise(momentum)` for arrays `[..., d_in, d_out]`.

    m <- momentum m + (1 - momentum) g; with Nesterov the update is momentum m + (1 - momentum) g.
    With `update_rms` the scale is update_rms sqrt(max(d_in, d_out)), so that learning rate and
    weight decay are AdamW's (Moonlight, arXiv 2502.16982, equation 4); without, sqrt(max(1, d_out /
    d_in)) as in Jordan's code.
    """

    def scale(shape: tuple[int, ...]) -> float:
        rows, columns = shape[-2:]
        if update_rms is None:
            return math.sqrt(max(1, columns / rows))
        return update_rms * math.sqrt(max(rows, columns))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        def average(m: Array, g: Array) -> Array:
            return momentum * m + (1 - momentum) * g

        moment = jax.tree.map(average, state.momentum, updates)
        ahead = jax.tree.map(average, moment, updates) if nesterov else moment
        direction = jax.tree.map(lambda x: scale(x.shape) * orthogonalise(x, rounds), ahead)
        return direction, MuonState(jax.tree.map(lambda m: m.astype(moment_dtype), moment))

    return optax.GradientTransformation(
        lambda params: MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, moment_dtype), params)),
        update_fn,
    )
