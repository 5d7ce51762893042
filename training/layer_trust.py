"""Optimizers that look at a whole matrix, made right for layers, and experts, stacked on leading
axes.

Under scan the matrices of one segment are one array `[layers, ...]`, those of a mixture's experts
`[layers, experts, ...]`. Whatever takes a norm, a root mean square or a factorisation of "the
matrix" must take it for each layer and expert apart, or training depends on how they are stored.
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


def stacked_axes(path: str) -> int:
    """How many axes stand before those of one matrix: of layers, and of a layer's experts."""
    return int(is_stacked(path)) * (2 if "/experts/" in path else 1)


def matrix_rank(path: str, leaf: Any) -> int:
    """Number of axes of one layer's (and expert's) array."""
    return leaf.ndim - stacked_axes(path)


def scale_by_layer_trust_ratio(
    stacked: Callable[[str], int] = stacked_axes, eps: float = 0.0
) -> optax.GradientTransformation:
    """LAMB's ratio `|x| / (|r| + eps)` on the update r of every layer's matrix x (arXiv
    1904.00962).

    Norms run over all axes but the `stacked(path)` leading ones. The ratio is 1 where either norm
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
    inner: optax.GradientTransformation, stacked: Callable[[str], int] = stacked_axes
) -> optax.GradientTransformation:
    """Run `inner` on every array by itself, and on every layer (and expert) of a stacked array by
    itself.

    `inner` must treat arrays independently (most of Optax does). The state is a tree like params
    with `inner`'s state of that array at each leaf, each of its arrays with the leading
    `stacked(path)` axes of the parameter.
    """

    def init(params: Any) -> Any:
        return map_leaves(lambda path, p: _mapped(inner.init, stacked(path))(p), params)

    def one(path: str, update: jax.Array, state: Any, param: jax.Array) -> Any:
        return _mapped(inner.update, stacked(path))(update, state, param)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        both = map_leaves(one, updates, state, params)
        structure = jax.tree.structure(updates)
        pairs = structure.flatten_up_to(both)
        return structure.unflatten([p[0] for p in pairs]), structure.unflatten(
            [p[1] for p in pairs]
        )

    return optax.GradientTransformation(init, update_fn)


def _mapped(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
