"""Which leaves of the params tree train: a predicate on their paths.

A frozen leaf is absent (None) from the trainable tree, so it has no gradient, no optimizer state
and no average. A path goes down to the arrays of a weight format, so adapters say `.*/kernel/(a|b)`
and leave their base alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from weights import path_string

Predicate = Callable[[str], bool]


def everything(path: str) -> bool:
    """The predicate of full training."""
    return True


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` over arrays (inside weight formats too); the function gets the path first."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, *leaves: function(path_string(key_path), *leaves), tree, *rest
    )


def leaf_paths(tree: Any) -> list[str]:
    """Paths of all arrays, in tree order."""
    return [path_string(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_patterns(patterns: Iterable[str], tree: Any, field: str = "trainable") -> Predicate:
    """True for paths that fully match any of the regexes; one that matches nothing is an error."""
    paths, chosen = leaf_paths(tree), set()
    for pattern in patterns:
        hits = [path for path in paths if re.fullmatch(pattern, path)]
        if not hits:
            raise ValueError(
                f"{field}: the pattern {pattern!r} matches no parameter; they are {_some(paths)}"
            )
        chosen.update(hits)
    return chosen.__contains__


def split_trainable(params: Any, predicate: Predicate) -> tuple[Any, Any]:
    """`(trainable, frozen)`: two trees like params, each with None where the other has the leaf.

    Raises ValueError if nothing would train, or if a chosen leaf is not floating point.
    """
    trainable = map_leaves(lambda path, leaf: leaf if predicate(path) else None, params)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"{path_string(key_path)} is {leaf.dtype}, which has no gradient; "
                "leave it out of trainable"
            )
    if not jax.tree.leaves(trainable):
        raise ValueError(f"no parameter is trainable; they are {_some(leaf_paths(params))}")
    return trainable, map_leaves(lambda path, leaf: None if predicate(path) else leaf, params)


def merge(trainable: Any, frozen: Any) -> Any:
    """The full tree that `split_trainable` took apart."""
    return jax.tree.map(
        lambda ours, other: other if ours is None else ours,
        trainable,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def _some(paths: list[str], count: int = 8) -> str:
    rest = f", and {len(paths) - count} more" if len(paths) > count else ""
    return ", ".join(paths[:count]) + rest
