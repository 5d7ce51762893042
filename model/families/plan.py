"""Which of our arrays lies where in the files of a checkpoint: names, rows, shapes, all checked.

The plan is made from the config and the names and shapes in the files' headers, before any data is
read: every tensor must be used and every array filled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.config import ModelConfig, Segment
from model.families.family import Family
from model.families.keys import FamilyError
from model.families.tensors import Tensor, present
from model.parameters import describe

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where one of our arrays lies.

    path: our path, the segment in it (`layers/000-006/attention/query/kernel`).
    tensor: their tensor.
    rows: rows of it along its output axis that are ours, None for all.
    whole: shape of one layer's array.
    shape: the same of one expert or head, if theirs come one by one.
    segment: layers that the array is stacked over, None outside the layers.
    experts: number of experts (or heads) that are separate tensors of theirs, None if not.
    """

    path: str
    tensor: Tensor
    rows: np.ndarray | None
    whole: Shape
    shape: Shape
    segment: Segment | None
    experts: int | None

    def name(self, layer: int, expert: int) -> str:
        """Their name for the array of a layer, counted in the model, and an expert or head."""
        return self.tensor.theirs.format(layer=layer, expert=expert, head=expert)


def sources(
    family: Family, config: ModelConfig, segments: Sequence[Segment] | None = None
) -> list[Source]:
    """The source of every array of the model, in the order of the params tree.

    `segments` is how the params cut the layers (`segments_of`); None is as the config does. Raises
    `FamilyError` if the family has no tensor for one of the model's arrays.
    """
    found = []
    for segment, shapes in _shapes(config, segments).items():
        layer = config.layer(0) if segment is None else segment.layer
        owners = _owners(family, shapes, layer)
        for path, shape in shapes.items():
            if path not in owners:
                raise FamilyError(f"family {family.name!r} has no tensor for {path} of this model")
            tensor = owners[path]
            full = _full_path(path, segment)
            experts, inner = _pieces(tensor, shape, layer)
            rows = _rows(tensor, path, layer, shapes)
            found.append(Source(full, tensor, rows, shape, inner, segment, experts))
    return found


def names(source: Source) -> list[str]:
    """Their names for an array: one, one a layer, or one for each expert of each layer."""
    layers = [0] if source.segment is None else range(source.segment.start, source.segment.stop)
    return [source.name(layer, expert) for layer in layers for expert in range(source.experts or 1)]


def their_shapes(family: Family, config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this model and its shape, layer by layer."""
    shapes: dict[str, tuple[int, Shape]] = {}
    by_tensor: dict[tuple[str, Segment | None], list[Source]] = {}
    for source in sources(family, config):
        by_tensor.setdefault((source.tensor.theirs, source.segment), []).append(source)
    for (_, segment), parts in by_tensor.items():
        shape = packed_shape(parts)
        for index, name in enumerate(names(parts[0])):
            layer = -1 if segment is None else segment.start + index // (parts[0].experts or 1)
            shapes[name] = (layer, shape)
    return {name: shape for name, (_, shape) in sorted(shapes.items(), key=lambda item: item[1][0])}


def packed_shape(parts: Sequence[Source]) -> Shape:
    """The shape of the tensor that holds these arrays."""
    *rest, _ = parts[0].shape
    shape = (*rest, sum(part.shape[-1] for part in parts))
    return their_order(parts[0].tensor, shape)


def their_order(tensor: Tensor, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes, slices or axes of ours in the order of their axes (and back: it is its own
    inverse).
    """
    if not tensor.transposed:
        return values
    return (*values[:-2], values[-1], values[-2])


def output_axis(tensor: Tensor) -> int:
    """Their axis along which parts are packed."""
    return -2 if tensor.transposed else -1


def stored_names(
    family: Family, config: ModelConfig, found: Mapping[str, Any], where: str
) -> dict[str, str]:
    """`{our name of a tensor: its name in the files}`: with the base model's prefix or without.

    `found` maps names in the files to what has `.shape` and `.file`. Raises `FamilyError` that
    lists up to ten names for each fault: missing, unexpected, of another shape.
    """
    wanted = their_shapes(family, config)
    prefix = family.prefix
    anchor = next(name for name in wanted if name.startswith(prefix))
    bare = anchor not in found and anchor.removeprefix(prefix) in found
    stored = {name: name.removeprefix(prefix) if bare else name for name in wanted}
    buffers = [re.compile(pattern) for pattern in family.buffers]
    names_found = {name for name in found if not any(b.fullmatch(name) for b in buffers)}
    missing = [name for name in wanted if stored[name] not in found]
    head = tied_head(family, config, found)
    expected = {*stored.values(), head}
    unexpected = sorted(name for name in names_found if name not in expected)
    shapes = [
        f"{stored[name]} is {list(found[stored[name]].shape)} in {found[stored[name]].file}, "
        f"the config makes it {list(shape)}"
        for name, shape in wanted.items()
        if stored[name] in found and tuple(found[stored[name]].shape) != shape
    ]
    if not (missing or unexpected or shapes):
        return stored
    faults = [
        f"{label} ({len(listed)}): " + "; ".join(listed[:10])
        for label, listed in (
            ("missing", missing),
            ("unexpected", [f"{n} {list(found[n].shape)}" for n in unexpected]),
            ("of another shape", shapes),
        )
        if listed
    ]
    hint = _hint(config, missing)
    raise FamilyError(f"{where} does not hold the tensors of its config; {'. '.join(faults)}{hint}")


def tied_head(family: Family, config: ModelConfig, found: Mapping[str, Any]) -> str | None:
    """The name of a stored head that a tied model has no array for, or None."""
    heads = [t.theirs for t in family.tensors if t.ours == ("head/kernel",)]
    return heads[0] if config.tied_embeddings and heads and heads[0] in found else None


def _hint(config: ModelConfig, missing: Sequence[str]) -> str:
    if any("lm_head" in name or "embed_out" in name for name in missing):
        return f". The head is absent though tie_word_embeddings is {config.tied_embeddings}"
    return ""


def _shapes(
    config: ModelConfig, segments: Sequence[Segment] | None
) -> dict[Segment | None, dict[str, Shape]]:
    """`{segment: {path without the segment: shape of one layer's array}}`."""
    shapes: dict[Segment | None, dict[str, Shape]] = {}
    for path, (spec, segment) in describe(config, segments).items():
        bare = path if segment is None else path.replace(f"layers/{segment.name}/", "layers/", 1)
        shapes.setdefault(segment, {})[bare] = spec.shape
    return shapes


def _owners(family: Family, shapes: Mapping[str, Shape], layer: ModelConfig) -> dict[str, Tensor]:
    owners: dict[str, Tensor] = {}
    for tensor in present(family.tensors, frozenset(shapes), layer):
        for path in tensor.ours:
            if path in owners:
                raise FamilyError(
                    f"family {family.name!r} has {path} in {owners[path].theirs} "
                    f"and in {tensor.theirs}"
                )
            owners[path] = tensor
    return owners


def _pieces(tensor: Tensor, shape: Shape, layer: ModelConfig) -> tuple[int | None, Shape]:
    """How many tensors of theirs hold an array of ours, None if it is in one; shape in each."""
    if tensor.by_expert:
        return shape[0], shape[1:]
    if tensor.by_head:
        assert layer.head_dim is not None
        return shape[0] // layer.head_dim, (layer.head_dim,)
    return None, shape


def _rows(
    tensor: Tensor, path: str, layer: ModelConfig, shapes: Mapping[str, Shape]
) -> np.ndarray | None:
    if tensor.packing is None:
        return None
    parts = tensor.packing(layer, [shapes[ours][-1] for ours in tensor.ours])
    return parts[tensor.ours.index(path)]


def _full_path(path: str, segment: Segment | None) -> str:
    return path if segment is None else path.replace("layers/", f"layers/{segment.name}/", 1)
