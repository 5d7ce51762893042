"""Modules that an adapter's file holds whole: a head, an embedding, norms, biases.

PEFT calls them `modules_to_save`; with `bias` other than "none" the biases come in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, Segment
from model.families.family import Family
from model.families.plan import Source, sources, their_shapes
from model.peft.config import AdapterFileError
from weights import is_format, nearest


@dataclass(frozen=True)
class WholeModules:
    """The tensors of a family's model, for those of a file that take their place.

    family, config: of the model. segments: how the params cut the layers. file: for messages.
    """

    family: Family
    config: ModelConfig
    segments: tuple[Segment, ...]
    file: Path

    def replaced(
        self, flat: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """`{our path: new weight}` of every weight that one of the tensors is a part of.

        Raises `AdapterFileError` for a tensor that the model does not have, or of another shape.
        """
        shapes = their_shapes(self.family, self.config)
        for name, array in tensors.items():
            if name not in shapes:
                close = nearest(name, shapes) or "none"
                raise AdapterFileError(f"{self.file}: the model has no {name}; nearest: {close}")
            if array.shape != shapes[name]:
                raise AdapterFileError(
                    f"{self.file}: {name} is {list(array.shape)}, the model's {list(shapes[name])}"
                )
        found: dict[str, Any] = {}
        for source in sources(self.family, self.config, self.segments):
            start, stop = (0, 1) if source.segment is None else _bounds(source)
            for number in range(start, stop):
                array = tensors.get(source.name(number, 0))
                if array is not None:
                    held = found.get(source.path, flat[source.path])
                    found[source.path] = self._with(source, held, number - start, array)
        return found

    def _with(self, source: Source, held: Any, layer: int, array: np.ndarray) -> Any:
        if source.experts is not None or (is_format(held) and source.segment is not None):
            raise AdapterFileError(
                f"{self.file}: {source.path} cannot be replaced: it is "
                + ("one an expert" if source.experts is not None else f"a {type(held).__name__}")
            )
        ours = np.swapaxes(array, -1, -2) if source.tensor.transposed else array
        ours = ours if source.rows is None else ours[..., source.rows]
        if source.segment is None:
            return jnp.asarray(ours, jnp.float32 if is_format(held) else held.dtype)
        return held.at[layer].set(jnp.asarray(ours, held.dtype))


def _bounds(source: Source) -> tuple[int, int]:
    assert source.segment is not None
    return source.segment.start, source.segment.stop
