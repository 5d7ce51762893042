"""One weight of the same path in all layers of a segment, and the layers' own, from one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from weights.protocol import is_format


def stack(layers: Sequence[Any]) -> Any:
    """The weights of the layers of a segment, every array with a `[layers]` axis in front.

    Formats must agree in their static fields and the shapes of their arrays; lists of indices may
    differ in length (`aligned` fills them up). Raises `ValueError` naming the layers and fields
    that differ from layer 0.
    """
    if not layers:
        raise ValueError("there are no layers to stack")
    layers = _aligned(layers)
    problems = [
        f"layer {index}: {found}"
        for index, layer in enumerate(layers)
        if (found := _difference(layers[0], layer))
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise ValueError(
            f"layers of one stack must be alike; other than layer 0: {'; '.join(problems[:4])}"
            f"{more}. Give layers that differ segments of their own"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack(weight: Any) -> list[Any]:
    """The weight of each layer of a stack."""
    count = jax.tree.leaves(weight)[0].shape[0]
    return [jax.tree.map(lambda leaf: leaf[layer], weight) for layer in range(count)]


def trimmed(tree: Any) -> Any:
    """The same params, lists that formats keep no longer than the longest that a layer uses."""
    return jax.tree.map(
        lambda one: one.trimmed() if hasattr(one, "trimmed") else one,
        tree,
        is_leaf=lambda node: hasattr(node, "trimmed"),
    )


def _aligned(layers: Sequence[Any]) -> Sequence[Any]:
    """The layers with all that may be filled up, in them and in their parts, of one length."""
    first = layers[0]
    if not dataclasses.is_dataclass(first) or any(type(one) is not type(first) for one in layers):
        return layers
    align = getattr(first, "aligned", list)
    found = align(layers)
    for field in dataclasses.fields(first):
        if dataclasses.is_dataclass(getattr(first, field.name)):
            parts = _aligned([getattr(layer, field.name) for layer in found])
            pairs = zip(found, parts, strict=True)
            found = [dataclasses.replace(layer, **{field.name: part}) for layer, part in pairs]
    return found


def _difference(first: Any, other: Any, name: str = "") -> str:
    """The first field in which a weight differs from another, in words; "" if none does."""
    label = f"{name} " if name else ""
    if type(first) is not type(other) and (is_format(first) or is_format(other)):
        return f"{label}is {type(other).__name__}, not {type(first).__name__}"
    if dataclasses.is_dataclass(first) and type(first) is type(other):
        names = [field.name for field in dataclasses.fields(first)]
        names.sort(key=lambda field: _holds_arrays(getattr(first, field)))
        for field in names:  # static fields first: shapes of arrays follow from them
            pair = (getattr(first, field), getattr(other, field))
            if found := _difference(*pair, field if not name else f"{name}.{field}"):
                return found
        return ""
    if isinstance(first, tuple) and isinstance(other, tuple) and len(first) == len(other):
        pairs = enumerate(zip(first, other, strict=True))
        return next((d for i, p in pairs if (d := _difference(*p, f"{name}[{i}]"))), "")
    if isinstance(first, jax.Array) and isinstance(other, jax.Array):
        same = first.shape == other.shape and first.dtype == other.dtype
        return "" if same else f"{label}is {_show(other)}, not {_show(first)}"
    return "" if first is other or first == other else f"{label}{other!r}, not {first!r}"


def _holds_arrays(value: Any) -> bool:
    return isinstance(value, jax.Array) or dataclasses.is_dataclass(value)


def _show(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
