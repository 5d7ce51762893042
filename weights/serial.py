"""A params tree as plain arrays plus a JSON description, which is what a checkpoint stores.

`to_arrays` replaces every format by a dict of its arrays and notes its name and static fields by
path; `from_arrays` is the inverse. Orbax therefore only ever sees nested dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from weights.protocol import is_weight
from weights.tree import map_with_path, nearest

FORMATS: dict[str, type] = {}
"""Format name -> class. The dense array has no entry: it is stored as it is."""


def to_arrays(tree: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Split a params tree into a nested dict of arrays and `{path: {"format": name, fields…}}`."""
    description: dict[str, dict[str, Any]] = {}

    def split(path: str, weight: Any) -> Any:
        if not dataclasses.is_dataclass(weight):
            return weight
        name = next((key for key, cls in FORMATS.items() if cls is type(weight)), None)
        if name is None:
            raise ValueError(
                f"{path}: weight format {type(weight).__name__} is not in weights.FORMATS"
            )
        fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
        arrays = {key: value for key, value in fields.items() if _holds_arrays(value)}
        description[path] = {
            "format": name,
            **{key: fields[key] for key in fields if key not in arrays},
        }
        nested, inner = to_arrays(arrays)
        description.update({f"{path}/{key}": value for key, value in inner.items()})
        return nested

    return map_with_path(split, tree), description


def from_arrays(arrays: Any, description: dict[str, dict[str, Any]]) -> Any:
    """Rebuild the tree that `to_arrays` took apart."""

    def build(path: str, node: Any) -> Any:
        if isinstance(node, dict):
            node = {
                key: build(f"{path}/{key}" if path else key, value) for key, value in node.items()
            }
        if path not in description:
            return node
        fields = dict(description[path])
        name = fields.pop("format")
        if name not in FORMATS:
            raise ValueError(
                f"{path}: unknown weight format {name!r}; nearest: {nearest(name, FORMATS)}"
            )
        return FORMATS[name](**node, **fields)

    return build("", arrays)


def _holds_arrays(value: Any) -> bool:
    return any(is_weight(leaf) for leaf in jax.tree.leaves(value, is_leaf=is_weight))
