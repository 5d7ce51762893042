"""Paths of a params tree, as rules, reports and errors write them: `layers/000-006/norm/scale`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from weights.protocol import is_weight

Path = str


def path_string(key_path: Iterable[Any]) -> Path:
    """A `jax.tree_util` key path as `a/b/0/c`."""
    return "/".join(_key_name(key) for key in key_path)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: Any) -> dict[Path, Any]:
    """`{path: weight}` in tree order; a format counts as one weight, not as its arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)
    return {path_string(key_path): leaf for key_path, leaf in leaves}


def paths(tree: Any) -> list[Path]:
    """The paths of all weights, in tree order."""
    return list(flatten(tree))


def map_with_path(
    function: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] = is_weight,
) -> Any:
    """`jax.tree.map` whose function also gets the path first; weights are its leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, *leaves: function(path_string(key_path), *leaves),
        tree,
        *rest,
        is_leaf=is_leaf,
    )


def from_flat(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict of `{"a/b/c": leaf}`."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`"a, b"`: the known names closest to a wrong one, for an error message."""
    return ", ".join(difflib.get_close_matches(name, list(known), n=count, cutoff=0.4))
