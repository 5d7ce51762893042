"""A surgery in progress: hidden states between blocks, and the blocks that are finished.

Neighbours that are stored alike share a stack, as far as the config lets them; a layer that is
stored otherwise (other formats, bits or groups) begins a stack of its own.

With a folder everything lies in files that are mapped into memory: memory stays that of one block,
and what is finished survives a kill. The hidden states before layers i and i + 1 lie in two
buffers, so those before layer i stay whole until layer i is noted as done.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import ModelConfig, Segment
from model.checkpoint_folder import CheckpointError, read_json, write_json
from model.segments import segment_at
from weights import flatten, from_arrays, from_flat, to_arrays

STATE = "state.json"
ROWS = "rows.json"


class Work:
    """Hidden states and finished layers of one run, in memory or in `folder`.

    `run` says which run it is (method, settings, inputs); a folder that holds another is refused.
    """

    def __init__(
        self, config: ModelConfig, folder: Path | None = None, run: Mapping[str, Any] | None = None
    ) -> None:
        self._config, self._segments = config, config.segments
        self._folder = folder
        self._arrays: dict[str, np.ndarray] = {}
        self._state: dict[str, Any] = {"run": _json(run or {}), "done": 0, "stacks": []}
        self._rows: list[dict[str, Any]] = []
        if folder is not None and (folder / STATE).exists():
            self._resume(folder)
        elif folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> int:
        """Layers that are finished."""
        return self._state["done"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The report's rows of the finished layers."""
        return list(self._rows)

    def hidden(self, name: str, layer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The buffer of hidden states before `layer`, to be filled or read."""
        return self._array(f"hidden/{name}-{layer % 2}", shape, dtype)

    def put(self, layer: int, params: Any, rows: list[dict[str, Any]]) -> None:
        """Note `layer` as done, with its new params and its rows of the report."""
        arrays, description = to_arrays(params)
        leaves = {path: np.asarray(leaf) for path, leaf in flatten(arrays).items()}
        form = _json({"arrays": _shapes(leaves), "weights": description})
        stacks = self._state["stacks"]
        begins = any(layer == segment.start for segment in self._segments)
        if begins or stacks[-1]["form"] != form:
            stacks.append({"start": layer, "form": form})
        for path, array in self._stack(stacks[-1]).items():
            array[layer - stacks[-1]["start"]] = leaves[path]
        self._rows += _json(rows)
        self._state["done"] = layer + 1
        if self._folder is not None:
            for array in self._arrays.values():
                if isinstance(array, np.memmap):
                    array.flush()
            write_json(self._folder / ROWS, self._rows)
            write_json(self._folder / STATE, self._state)

    def layers(self) -> dict[str, Any]:
        """The finished layers in their stacks, as the params tree has them."""
        stacks = self._state["stacks"]
        stops = [stack["start"] for stack in stacks[1:]] + [self.done]
        found = {}
        for stack, stop in zip(stacks, stops, strict=True):
            start = stack["start"]
            arrays = {path: array[: stop - start] for path, array in self._stack(stack).items()}
            name = Segment(start, stop, self._config.layer(start)).name
            found[name] = from_arrays(from_flat(arrays), stack["form"]["weights"])
        return found

    def remove(self) -> None:
        """Delete the folder."""
        self._arrays.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def _resume(self, folder: Path) -> None:
        state = read_json(folder / STATE)
        wanted = self._state["run"]
        if state["run"] != wanted:
            keys = sorted(
                k for k in {*wanted, *state["run"]} if wanted.get(k) != state["run"].get(k)
            )
            key = keys[0]
            raise CheckpointError(
                f"{folder} holds an unfinished run with {key} = {state['run'].get(key)!r}, not "
                f"{wanted.get(key)!r}: finish that one with its own settings, or delete the folder"
            )
        self._state = state
        rows = read_json(folder / ROWS) if state["done"] else []
        self._rows = [row for row in rows if row["layer"] < state["done"]]

    def _stack(self, stack: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Its arrays, with room for all layers that may still come to it."""
        start = stack["start"]
        room = segment_at(self._segments, start).stop - start
        return {
            path: self._array(f"layers/{start:03d}/{path}", (room, *shape), jnp.dtype(dtype))
            for path, (shape, dtype) in stack["form"]["arrays"].items()
        }

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if name in self._arrays:
            return self._arrays[name]
        dtype = np.dtype(dtype)
        if self._folder is None or not math.prod(shape):
            array = np.zeros(shape, dtype)
        else:
            path = self._folder / f"{name.replace('/', '.')}.bin"
            right = path.exists() and path.stat().st_size == math.prod(shape) * dtype.itemsize
            array = np.memmap(path, dtype, "r+" if right else "w+", shape=tuple(shape))
        self._arrays[name] = array
        return array


def _shapes(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()}


def _json(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(jax.tree.map(_plain, value)))


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return value.item()
    return value
