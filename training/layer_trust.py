"""Optimizers that look at a whole matrix, made right for layers stacked on a leading axis.

Under scan the matrices of one segment are one array `[layers, ...]`. Whatever takes a norm, a root
mean square or a factorisation of "the matrix" must take it for each layer apart, or training
depends on how layers are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sharding.rules import STACKED
from training.trainable import map_leaves


def is_stacked(path: str) -> bool:
    """True for paths under a segment, `layers/000-006/…`: a leading layer axis."""
    return STACKED.fullmatch(path) is not None


def matrix_rank(path: str, leaf: Any) -> int:
    """Number of axes of one layer's array."""
    return leaf.ndim - is_stacked(path)


def scale_by_layer_trust_ratio(
    stacked: Callable[[str], bool] = is_stacked, eps: float = 0.0
) -> optax.GradientTransformation:
    """LAMB's ratio `|x| / (|r| + eps)` on the update r of every layer's matrix x (arXiv
    1904.00962).

    Norms run over all axes but the layer axis of a stacked array. The ratio is 1 where either norm
    is 0, and for vectors (norms, biases).
    """

    def scale(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if update.ndim - stacked(path) < 2:
            return update
        axes = tuple(range(int(stacked(path)), update.ndim))
        size, length = _norm(param, axes), _norm(update, axes)
        positive = (size > 0) & (length > 0)
        return update * jnp.where(positive, size / jnp.where(positive, length + eps, 1), 1)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return map_leaves(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def per_layer(
    inner: optax.GradientTransformation, stacked: Callable[[str], bool] = is_stacked
) -> optax.GradientTransformation:
    """Run `inner` on every array by itself, and on every layer of a stacked array by itself.

    `inner` must treat arrays independently (most of Optax does). The state is a tree like params
    with `inner`'s state of that array at each leaf, each of its arrays with a leading layer axis
    where the parameter has one.
    """

    def init(params: Any) -> Any:
        return map_leaves(
            lambda path, p: jax.vmap(inner.init)(p) if stacked(path) else inner.init(p), params
        )

    def one(path: str, update: jax.Array, state: Any, param: jax.Array) -> Any:
        return (jax.vmap(inner.update) if stacked(path) else inner.update)(update, state, param)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        both = map_leaves(one, updates, state, params)
        structure = jax.tree.structure(updates)
        pairs = structure.flatten_up_to(both)
        return structure.unflatten([p[0] for p in pairs]), structure.unflatten(
            [p[1] for p in pairs]
        )

    return optax.GradientTransformation(init, update_fn)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
