"""Their modules and our kernels: which of our matrices lie in a linear layer of theirs, and where.

The names come from the family's tensors, the same list that reads and writes whole checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.config import ModelConfig, Segment
from model.families.family import Family
from model.families.plan import Source, sources


@dataclass(frozen=True)
class Part:
    """One of our matrices in a module of theirs.

    path: ours, `layers/000-006/attention/query/kernel`.
    layer: its place in the stack; None outside the layers.
    columns: outputs of theirs that are ours, in our order.
    """

    path: str
    layer: int | None
    columns: np.ndarray


@dataclass(frozen=True)
class Module:
    """A linear layer of theirs.

    name: `model.layers.0.self_attn.q_proj`.
    d_in, d_out: its sizes.
    parts: our matrices in it, side by side.
    conv1d: stored `[in, out]`.
    """

    name: str
    d_in: int
    d_out: int
    parts: tuple[Part, ...]
    conv1d: bool


def linear_modules(
    family: Family, config: ModelConfig, segments: Sequence[Segment]
) -> dict[str, Module]:
    """Every linear layer that is one matrix of theirs, by name; experts are left out.

    `segments` is how the params cut the layers (`model.segments_of`).
    """
    by_name: dict[str, list[tuple[Source, int | None]]] = {}
    for source in sources(family, config, segments):
        if source.experts is not None or not source.path.endswith("/kernel"):
            continue
        if len(source.shape) != 2:
            continue
        segment = source.segment
        layers = [None] if segment is None else list(range(segment.stop - segment.start))
        for layer in layers:
            number = 0 if segment is None or layer is None else segment.start + layer
            by_name.setdefault(source.name(number, 0), []).append((source, layer))
    return {
        name.removesuffix(".weight"): _module(name.removesuffix(".weight"), held)
        for name, held in by_name.items()
    }


def _module(name: str, held: list[tuple[Source, int | None]]) -> Module:
    parts = tuple(
        Part(
            source.path,
            layer,
            np.arange(source.shape[-1]) if source.rows is None else np.asarray(source.rows),
        )
        for source, layer in held
    )
    first = held[0][0]
    d_out = sum(source.shape[-1] for source, _ in held)
    return Module(name, first.shape[0], d_out, parts, not first.tensor.transposed)


def by_path(modules: Mapping[str, Module]) -> dict[str, list[tuple[Module, Part]]]:
    """`{our path: the modules that hold its layers, in order}`."""
    found: dict[str, list[tuple[Module, Part]]] = {}
    for module in modules.values():
        for part in module.parts:
            found.setdefault(part.path, []).append((module, part))
    return found
