"""Calibration statistics in a folder: one pass over the unquantized model, for many methods.

    FOLDER/statistics.json       of which model and windows, and the seconds that the pass took
    FOLDER/007/attention.output.npz    the arrays of `Stats` of a site of layer 7

Methods that learn from the layers already quantized share none: their inputs are their own.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.checkpoint_folder import PARTIAL, read_json, write_json
from surgery.blocks import Site
from surgery.calibration import Stats

RECORD = "statistics.json"


class SavedStatistics:
    """The statistics of each layer's sites, as they are found or made.

    `of` says of what they are (checkpoint, windows, compute dtype), in JSON's types; a folder that
    holds others is refused with `ValueError`.
    """

    def __init__(self, folder: str | Path, of: Mapping[str, Any]) -> None:
        self._folder = Path(folder).absolute()
        path = self._folder / RECORD
        self._record: dict[str, Any] = {"of": dict(of), "seconds": 0.0}
        if not path.exists():
            return
        self._record = read_json(path)
        known = self._record["of"]
        for key in sorted({*known, *of}):
            if known.get(key) != of.get(key):
                raise ValueError(
                    f"{self._folder} holds statistics with {key} = {known.get(key)!r}, not "
                    f"{of.get(key)!r}: name another folder, or delete it"
                )

    @property
    def seconds(self) -> float:
        """That the pass took."""
        return self._record["seconds"]

    def whole(self, layers: int) -> bool:
        """Whether all layers are there."""
        return all(self._of_layer(layer).is_dir() for layer in range(layers))

    def read(self, layer: int, sites: Iterable[Site]) -> dict[Site, Stats]:
        """The statistics of some sites; raises `OSError` if there are none."""
        found = {}
        for site in sites:
            with np.load(self._of_layer(layer) / _file(site)) as arrays:
                names = [field.name for field in dataclasses.fields(Stats)]
                found[site] = Stats(**{name: jnp.asarray(arrays[name]) for name in names})
        return found

    def write(self, layer: int, stats: Mapping[Site, Stats], seconds: float) -> None:
        """Keep the statistics of a layer, measured in so many seconds; at once or not at all."""
        place = self._of_layer(layer)
        if place.exists():
            return
        partial = place.with_name(place.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for site, found in stats.items():
            names = [field.name for field in dataclasses.fields(Stats)]
            arrays: dict[str, Any] = {name: np.asarray(getattr(found, name)) for name in names}
            np.savez(partial / _file(site), **arrays)
        self._record["seconds"] += seconds
        write_json(self._folder / RECORD, self._record)
        partial.rename(place)

    def _of_layer(self, layer: int) -> Path:
        return self._folder / f"{layer:03d}"


def _file(site: Site) -> str:
    return f"{site.name.replace('/', '.')}.npz"
