"""From rules and a layout to the sharding of every array: params, gradients, optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.layout import Layout, axis_names, suggest_mesh
from sharding.mesh import show_sizes
from sharding.rules import STACKED, Rule, match_rules
from weights import check_split, flatten, map_with_path, path_string, specs


def partition(tree: Any, rules: Sequence[Rule], layout: Layout, role: str = "weights") -> Any:
    """`NamedSharding` of every array, in the structure of `tree` (arrays or weight formats).

    A format's arrays follow from the spec of the matrix that it stands for. Raises `ValueError` if
    a rule matches nothing, an array has no rule or another number of axes, or a mesh axis does not
    divide an array (the error names array, axis, sizes, and a mesh that would work).
    """
    matched = match_rules(rules, flatten(tree))
    shardings = map_with_path(
        lambda path, weight: _shard(path, weight, matched[path], layout, role), tree
    )
    check_divisible(tree, shardings, {path: rule.axes_at(path) for path, rule in matched.items()})
    return shardings


def _shard(path: str, weight: Any, rule: Rule, layout: Layout, role: str) -> Any:
    axes = rule.axes_at(path)
    try:
        spec = layout.spec(axes, role)
    except ValueError as error:
        raise ValueError(f"{path} (rule {rule.pattern!r}): {error}") from None
    if hasattr(weight, "shape") and not hasattr(weight, "specs") and len(axes) != len(weight.shape):
        raise ValueError(
            f"{path}: shape {tuple(weight.shape)} has {len(weight.shape)} axes but rule "
            f"{rule.pattern!r} gives {len(axes)}: {axes}"
        )
    degrees = [math.prod(layout.mesh.shape[name] for name in axis_names(entry)) for entry in spec]
    if len(degrees) > 1:
        check_split(path, weight, (degrees[-2], degrees[-1]))
    return jax.tree.map(
        lambda entry: NamedSharding(layout.mesh, entry),
        _piece_specs(path, weight, spec),
        is_leaf=_is_spec,
    )


def _piece_specs(path: str, weight: Any, spec: PartitionSpec) -> Any:
    """Specs of a weight's own arrays; a format knows one layer, the stack's axis is set apart."""
    if not hasattr(weight, "specs") or not STACKED.fullmatch(path):
        return specs(weight, spec)
    pieces = specs(weight, PartitionSpec(*spec[1:]))
    return jax.tree.map(lambda piece: PartitionSpec(spec[0], *piece), pieces, is_leaf=_is_spec)


def check_divisible(tree: Any, shardings: Any, axes: Mapping[str, Any] | None = None) -> None:
    """Raise `ValueError` for arrays that the mesh does not divide, with a mesh that would work.

    `axes`: `{path: logical axes}`, which the message names where it can.
    """
    needs, problems, mesh = [], [], None
    for path, (array, sharding) in _arrays(tree, shardings).items():
        mesh = sharding.mesh
        for index, entry in enumerate(sharding.spec):
            names = axis_names(entry)
            needs.append((array.shape[index], names))
            if array.shape[index] % math.prod(mesh.shape[name] for name in names):
                logical = (axes or {}).get(path)
                name = logical[index] if logical else None
                problems.append(_indivisible(path, array.shape, index, name, sharding))
    if problems and mesh is not None:
        shown = "\n  ".join(problems[:5]) + (
            f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise ValueError(
            f"the mesh does not divide these arrays:\n  {shown}\n"
            f"a mesh that would work: {suggest_mesh(mesh, needs)}"
        )


def _arrays(tree: Any, shardings: Any) -> dict[str, tuple[Any, NamedSharding]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    pairs = zip(leaves, jax.tree.leaves(shardings), strict=True)
    return {path_string(key_path): (array, sharding) for (key_path, array), sharding in pairs}


def _indivisible(
    path: str, shape: tuple[int, ...], index: int, logical: str | None, sharding: NamedSharding
) -> str:
    axis = f"axis {index}" + (f" ({logical})" if logical else "")
    names = axis_names(sharding.spec[index])
    sizes = show_sizes({name: sharding.mesh.shape[name] for name in names})
    return f"{path} {tuple(shape)}: {axis} of size {shape[index]} does not divide over {sizes}"


def state_shardings(state: Any, params: Any, shardings: Any) -> Any:
    """Shardings of an optimizer's state: moments go where their parameters' state goes.

    An array whose path ends in a parameter's path and that has its shape takes the sharding at that
    path of `shardings` (which has the structure of `params`; give it the role "optimizer"); all
    else (counts, factored moments) is replicated. Works below any wrapper of Optax, masks included.
    """
    known = {
        path: (tuple(array.shape), sharding)
        for path, (array, sharding) in _arrays(params, shardings).items()
    }
    whole = NamedSharding(next(iter(known.values()))[1].mesh, PartitionSpec())

    def place(key_path: Any, array: Any) -> NamedSharding:
        parts = path_string(key_path).split("/")
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, whole))
            if shape == tuple(array.shape):
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def sharded_init(init: Callable[..., Any], shardings: Any, *args: Any) -> Any:
    """`init(*args)`, each device making only its own pieces; values do not depend on the mesh."""
    return jax.jit(init, out_shardings=shardings)(*args)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
