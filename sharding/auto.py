"""Sharding rules for a model that nobody wrote rules for, from its names and shapes.

After Redco (Tan et al. 2023, "RedCoast", section 3.1): matrices alternate between splitting their
outputs and their inputs, attention splits by heads, embeddings and heads by vocabulary. Names
decide first, then the traced graph if the caller gives one, then alternation in sorted order. What
comes out are ordinary rules, logged as a table to edit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sharding.auto_graph import column_row_pairs
from sharding.auto_names import PARTS, Part, is_expert, name_part, words
from sharding.rules import STACKED, Axes, Rule, rules_table
from weights import dequantize, flatten

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

VARIABLE = re.compile(r"/(kernel|embedding|bias|scale)/value$")
"""An array inside a variable of a Flax NNX state, read as the array itself."""


def derive_rules(
    params: Any,
    axis: str = "tensor",
    degree: int = 1,
    *,
    fsdp: int = 1,
    num_heads: int | None = None,
    kv_heads: int | None = None,
    apply: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
) -> tuple[Rule, ...]:
    """Rules for any params tree, so that every matrix that can be is split `degree` ways.

    Args:
        params: tree of arrays, abstract arrays or weight formats.
        axis: name of the mesh axis, for messages.
        degree: its size.
        fsdp: size of the fsdp axis, which splits the largest remaining dimension that it divides,
            under the logical name "d_model".
        num_heads: query heads, never split inside a head; None: the columns must divide.
        kv_heads: key and value heads, likewise.
        apply: `apply(params, *inputs)` to trace where names say nothing.
        inputs: arrays or abstract arrays for it.

    Stacked layers keep their leading axis, norms and biases of row-split layers stay whole, biases
    of column-split layers follow their outputs, `[experts, …]` arrays are split over experts.
    Initial values and multipliers are the defaults of `Rule`. Raises `ValueError` with the degrees
    that would work if nothing can be split.
    """
    shapes = {VARIABLE.sub(r"/\1", p): _shape(p, weight) for p, weight in flatten(params).items()}
    stacked = _stacked(shapes)
    layer = {path: shape[path in stacked :] for path, shape in shapes.items()}
    parts = _parts(layer, lambda: column_row_pairs(apply, params, *inputs) if apply else ())
    units = {"heads": num_heads, "kv_heads": kv_heads}
    axes = {
        path: _matrix_axes(path, layer[path], part, degree, fsdp, units)
        for path, part in parts.items()
    }
    _check_any(layer, parts, axes, axis, degree)
    for path in layer.keys() - axes.keys():
        axes[path] = _vector_axes(path, layer[path], axes)
    explicit = {
        path: ("layers", *axes[path])
        if path in stacked and not STACKED.fullmatch(path)
        else axes[path]
        for path in shapes
    }
    suffix = "" if shapes.keys() == flatten(params).keys() else "(?:/value)?"
    rules = tuple(Rule(pattern + suffix, found) for pattern, found in _patterns(explicit).items())
    logger.info("sharding rules derived from names and shapes:\n%s", rules_table(rules))
    return rules


def _shape(path: str, weight: Any) -> Shape:
    if hasattr(weight, "shape"):
        return tuple(weight.shape)
    dense = jax.vmap(dequantize) if STACKED.fullmatch(path) else dequantize
    return tuple(jax.eval_shape(dense, weight).shape)


def _stacked(shapes: dict[str, Shape]) -> set[str]:
    """Arrays with a leading layer axis: below `layers/0-6/`, or where even norms have two axes."""
    found = {path for path in shapes if STACKED.fullmatch(path)}
    norms = [path for path, shape in shapes.items() if len(shape) == 2 and _is_norm(path)]
    for norm in norms:
        names = norm.split("/")
        for depth in range(len(names)):
            prefix = "/".join([*names[:depth], ""])
            below = [path for path in shapes if path.startswith(prefix)]
            layers = {shapes[path][:1] for path in below} == {shapes[norm][:1]}
            if layers and max(len(shapes[path]) for path in below) >= 3:
                found.update(below)
                break
    return found


def _is_norm(path: str) -> bool:
    module = path.split("/")[-2:-1]
    named = any(words(name) & {"norm", "layernorm", "ln"} for name in module)
    return path.endswith("/scale") or (named and path.endswith(("/weight", "/bias")))


def _parts(
    layer: dict[str, Shape], pairs: Callable[[], Sequence[tuple[str, str]]]
) -> dict[str, Part]:
    """The part of every matrix: by name, else by the graph, else alternating."""
    parts = {}
    for path, shape in layer.items():
        name = name_part(path)
        if name != "vector" and len(shape) >= 2:
            parts[path] = PARTS[name]
            if name == "fused" and len(shape) == 4:
                parts[path] = PARTS["query"]
    unknown = [path for path, part in parts.items() if part.side == "unknown"]
    if unknown:
        for first, second in pairs():
            if "unknown" in (parts[first].side, parts[second].side) and parts[first].side != "row":
                parts[first], parts[second] = _paired(parts[first], parts[second])
    _alternate(parts)
    return parts


def _paired(first: Part, second: Part) -> tuple[Part, Part]:
    return (
        Part("column", first.axis) if first.side == "unknown" else first,
        Part("row", second.axis) if second.side == "unknown" else second,
    )


def _alternate(parts: dict[str, Part]) -> None:
    """Redco's rule for the rest, by key (the last two names) in sorted order: columns, rows, …"""
    unknown = {path: _key(path) for path, part in parts.items() if part.side == "unknown"}
    sides = {
        key: ("column", "row")[index % 2] for index, key in enumerate(sorted(set(unknown.values())))
    }
    for path, key in unknown.items():
        parts[path] = Part(sides[key])


def _key(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def _matrix_axes(
    path: str, shape: Shape, part: Part, degree: int, fsdp: int, units: dict[str, int | None]
) -> Axes:
    axes: list[str | None] = [None] * len(shape)
    if _expert_stack(path, shape):
        axes[0] = "experts"
    place = _place(path, shape, part)
    if place is not None:
        count = units.get(part.axis) or shape[place]
        if count % degree == 0 and shape[place] % degree == 0:
            axes[place] = part.axis
        else:
            logger.info(
                "%s %s: %d %s stay whole, not split %d ways", path, shape, count, part.axis, degree
            )
    free = [index for index, name in enumerate(axes) if name is None and shape[index] % fsdp == 0]
    if path.endswith(("embedding", "table")):
        free = [index for index in free if index == len(shape) - 1]
    if free:
        axes[max(free, key=lambda index: shape[index])] = "d_model"
    return tuple(axes)


def _place(path: str, shape: Shape, part: Part) -> int | None:
    """The dimension to split; heads are the last but one of `[d_model, heads, head_dim]`."""
    if part.side == "whole":
        return None
    if part.side == "row":
        return int(_expert_stack(path, shape))
    by_heads = part.axis in ("heads", "kv_heads") and len(shape) >= 3
    return len(shape) - (2 if by_heads else 1)


def _expert_stack(path: str, shape: Shape) -> bool:
    return is_expert(path) and len(shape) >= 3


def _vector_axes(path: str, shape: Shape, matrices: dict[str, Axes]) -> Axes:
    """A bias follows the outputs of its matrix, all other vectors stay whole."""
    module, _, leaf = path.rpartition("/")
    kernel = next(
        (
            matrices[other]
            for other in (f"{module}/kernel", f"{module}/weight")
            if other in matrices
        ),
        None,
    )
    if leaf != "bias" or kernel is None or len(shape) >= len(kernel):
        return (None,) * len(shape)
    expert = kernel[:1] if kernel[0] == "experts" else ()
    tail = kernel[len(kernel) - len(shape) + len(expert) :]
    return (*expert, *(None if name == "d_model" else name for name in tail))


def _patterns(axes: dict[str, Axes]) -> dict[str, Axes]:
    r"""`{pattern: axes}`: layer numbers become `\d+` wherever all arrays that would match agree."""
    grouped: dict[str, dict[str, Axes]] = {}
    for path, found in axes.items():
        grouped.setdefault(_general(path), {})[path] = found
    patterns: dict[str, Axes] = {}
    for pattern, members in grouped.items():
        if len(set(members.values())) == 1:
            patterns[pattern] = next(iter(members.values()))
        else:
            patterns.update({re.escape(path): found for path, found in members.items()})
    return patterns


def _general(path: str) -> str:
    """A path with `\\d+` for numbers, but not in its last two names: `fc1`, `fc2` are no layers."""
    names = path.split("/")
    general = []
    for index, name in enumerate(names):
        numbered = index < len(names) - 2 or re.fullmatch(r"[\d-]+", name)
        escaped = re.escape(name).replace(r"\-", "-")
        general.append(re.sub(r"\d+", r"\\d+", escaped) if numbered else escaped)
    return "/".join(general)


def _check_any(
    layer: dict[str, Shape], parts: dict[str, Part], axes: dict[str, Axes], axis: str, degree: int
) -> None:
    split = any(part.axis in axes[path] for path, part in parts.items() if part.side != "whole")
    if degree == 1 or split:
        return
    places = {path: _place(path, layer[path], part) for path, part in parts.items()}
    sizes = [layer[path][place] for path, place in places.items() if place is not None]
    degrees = range(2, max(sizes, default=1) + 1)
    all_split = [n for n in degrees if all(size % n == 0 for size in sizes)]
    some_split = [n for n in degrees if any(size % n == 0 for size in sizes)]
    raise ValueError(
        f"no matrix can be split {degree} ways over mesh axis {axis!r}; degrees that would work: "
        f"{', '.join(map(str, (all_split or some_split)[:12])) or 'only 1'}"
    )
