"""A params tree as plain arrays plus a JSON description, which is what a checkpoint stores.

`to_arrays` replaces every format by a dict of its arrays and notes its name and static fields by
path; `from_arrays` is the inverse. Orbax therefore only ever sees nested dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from weights.act_quant import ActQuant
from weights.codebook import Codebook
from weights.grouped import Grouped
from weights.int8 import Int8, Outlier
from weights.low_rank import LowRank
from weights.low_rank_bank import LowRankBank
from weights.lut import Lut
from weights.mixed import Mixed
from weights.permuted import Permuted
from weights.protocol import is_weight
from weights.second_order import SecondOrder
from weights.sparse_outlier import SparseOutlier
from weights.tree import map_with_path, nearest

FORMATS: dict[str, type] = {
    "act_quant": ActQuant,
    "codebook": Codebook,
    "grouped": Grouped,
    "int8": Int8,
    "low_rank": LowRank,
    "low_rank_bank": LowRankBank,
    "lut": Lut,
    "mixed": Mixed,
    "outlier": Outlier,
    "permuted": Permuted,
    "second_order": SecondOrder,
    "sparse_outlier": SparseOutlier,
}
"""Name in a checkpoint -> class: the formats, and what may stand inside one. The dense array has no
entry: it is stored as it is.
"""


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
        nested = {key: value for key, value in fields.items() if _is_nested(value)}
        description[path] = {
            "format": name,
            **{key: fields[key] for key in fields if key not in nested},
        }
        arrays, inner = to_arrays(nested)
        description.update({f"{path}/{key}": value for key, value in inner.items()})
        return arrays

    return map_with_path(split, tree, is_leaf=_is_split), description


def from_arrays(arrays: Any, description: dict[str, dict[str, Any]]) -> Any:
    """Rebuild the tree that `to_arrays` took apart."""

    def build(path: str, node: Any) -> Any:
        if isinstance(node, dict):
            node = {
                key: build(f"{path}/{key}" if path else key, value) for key, value in node.items()
            }
        elif isinstance(node, tuple | list):
            return tuple(build(f"{path}/{index}", value) for index, value in enumerate(node))
        if path not in description:
            return node
        fields = {key: _static(value) for key, value in description[path].items()}
        name = fields.pop("format")
        if name not in FORMATS:
            raise ValueError(
                f"{path}: unknown weight format {name!r}; nearest: {nearest(name, FORMATS)}"
            )
        return FORMATS[name](**{key: _in_order(value) for key, value in node.items()}, **fields)

    return build("", _with_empty(arrays, description))


def _with_empty(arrays: Any, description: dict[str, dict[str, Any]]) -> Any:
    """The same dicts, with one for each described part that has no arrays."""
    tree = jax.tree.map(lambda leaf: leaf, arrays, is_leaf=lambda node: not isinstance(node, dict))
    for path in description:
        node = tree
        for name in path.split("/") if path else ():
            node = node.setdefault(name, {}) if isinstance(node, dict) else node[int(name)]
    return tree


def _in_order(value: Any) -> Any:
    """A field that was a tuple, which a folder of arrays holds by number."""
    if isinstance(value, dict) and value and all(key.isdigit() for key in value):
        return tuple(value[key] for key in sorted(value, key=int))
    return tuple(value) if isinstance(value, list) else value


def _static(value: Any) -> Any:
    """A static field as it was before it went through JSON."""
    return tuple(map(_static, value)) if isinstance(value, list) else value


def _is_split(node: Any) -> bool:
    return is_weight(node) or type(node) in FORMATS.values()


def _is_nested(value: Any) -> bool:
    """Whether a field holds arrays or parts, and so goes on below the format's path."""
    return any(_is_split(leaf) for leaf in jax.tree.leaves(value, is_leaf=_is_split))
