"""How a tree of params cuts the layers into stacks; the names below `layers/` say it: `000-006`.

The config cuts them where layers differ in what they compute. Params may cut them finer: where
layers are stored in other formats or with other static fields, or for a loop that reads each in
place (`model.layers_apart`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.config import ModelConfig, Segment

NAME = re.compile(r"(\d+)-(\d+)")


def segments_of(params: Mapping[str, Any], config: ModelConfig) -> tuple[Segment, ...]:
    """The segments of the params in order: those of the config, or pieces of them.

    Raises `ValueError` unless the stacks hold each layer of the config once, none of two kinds.
    """
    wholes, found, reached = config.segments, [], 0
    names = sorted(params.get("layers", {}))
    for start, stop in sorted(map(_bounds, names)):
        whole = next((s for s in wholes if s.start <= start < stop <= s.stop), None)
        if whole is None or start != reached:
            break
        found.append(Segment(start, stop, whole.layer))
        reached = stop
    if reached != config.num_layers or {one.name for one in found} != set(names):
        raise ValueError(
            f"its layers are stacked as {', '.join(names) or 'nothing'}; this "
            f"config has layers 0 to {config.num_layers - 1}, stacked as "
            f"{', '.join(whole.name for whole in wholes)} or in pieces of these"
        )
    return tuple(found)


def segment_at(segments: Sequence[Segment], layer: int) -> Segment:
    """The segment that holds a layer."""
    return next(segment for segment in segments if segment.start <= layer < segment.stop)


def _bounds(name: str) -> tuple[int, int]:
    found = NAME.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else (-1, -1)
