"""Where a surgery reads a model from: params in memory, or a checkpoint folder layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from model import ModelConfig
from model import checkpoint_arrays as arrays
from model import checkpoint_folder as folders
from model.checkpoint import check_architecture, read_model
from model.checkpoint_folder import CheckpointError
from model.segments import segment_at, segments_of
from weights import from_arrays, from_flat

Params = Mapping[str, Any]


class Source(Protocol):
    """A model, read in parts."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        ...

    def outer(self) -> dict[str, Any]:
        """All params but the layers'."""
        ...

    def layer(self, index: int) -> dict[str, Any]:
        """The params of one layer, by path below its segment."""
        ...


class InMemory:
    """A params tree at hand."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        self.config, self._params = config, params
        self._segments = segments_of(params, config)

    def outer(self) -> dict[str, Any]:
        """All params but the layers'."""
        return {name: part for name, part in self._params.items() if name != "layers"}

    def layer(self, index: int) -> dict[str, Any]:
        """The params of one layer, sliced out of their stack."""
        segment = segment_at(self._segments, index)
        stack = self._params["layers"][segment.name]
        return jax.tree.map(lambda leaf: leaf[index - segment.start], stack)


class Folder:
    """A checkpoint on disk, or the newest good one of a run; whole, or `CheckpointError`.

    config, files, provenance: as `model.checkpoint.load` gives them.
    description: the weight format at each path, empty for a model of plain arrays.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folders.locate(folder).absolute()
        self.config, self.description, names = read_model(self.folder)
        self.files = folders.read_files(self.folder, names)
        self.provenance = folders.read_json(self.folder / folders.PROVENANCE)
        self._stored = arrays.stored(self.folder / folders.PARAMS)
        tree = from_arrays(from_flat(self._stored), self.description)
        check_architecture(self.folder, self.config, tree)
        self._segments = segments_of(tree, self.config)

    def outer(self) -> dict[str, Any]:
        """All params but the layers'."""
        wanted = {p: leaf for p, leaf in self._stored.items() if not p.startswith("layers/")}
        found = arrays.restore(self.folder / folders.PARAMS, wanted)
        described = {p: v for p, v in self.description.items() if not p.startswith("layers/")}
        return from_arrays(from_flat(found), described)

    def layer(self, index: int) -> dict[str, Any]:
        """The params of one layer; no other layer's are read."""
        segment = segment_at(self._segments, index)
        prefix, row = f"layers/{segment.name}/", index - segment.start
        found = {
            path.removeprefix(prefix): self._row(path, row)
            for path in self._stored
            if path.startswith(prefix)
        }
        described = {
            path.removeprefix(prefix): value
            for path, value in self.description.items()
            if path.startswith(prefix)
        }
        return from_arrays(from_flat(found), described)

    def _row(self, path: str, row: int) -> np.ndarray:
        return arrays.read_row(self.folder / folders.PARAMS, path, row)


def dense(source: Folder) -> Folder:
    """The same; raises `CheckpointError` if some of its weights are quantized already."""
    if source.description:
        path, fields = next(iter(source.description.items()))
        raise CheckpointError(
            f"{source.folder} is quantized already: {path} is stored as {fields['format']!r} (and "
            f"{len(source.description) - 1} more); start from the checkpoint that it was made of: "
            f"{', '.join(source.provenance.get('parents', [])) or 'unknown'}"
        )
    return source
