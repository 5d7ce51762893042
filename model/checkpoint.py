"""A model as a folder: `save` and `load`, which training, serving, surgery and evaluation share.

`model.checkpoint_folder` says what lies in the folder. `load` reads the parameters only, straight
onto a mesh: an optimizer's state beside them is never opened.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from model import checkpoint_arrays as arrays
from model import checkpoint_folder as folders
from model.checkpoint_folder import CheckpointError
from model.config import ModelConfig
from model.parameters import abstract, rules
from model.segments import segments_of
from sharding import Layout, partition
from weights import flatten, from_arrays, from_flat, is_format, nearest, to_arrays


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model that was read: what it is, its parameters, its files and where it came from."""

    config: ModelConfig
    params: Any
    files: Mapping[str, bytes]
    provenance: Mapping[str, Any]
    folder: Path


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Any,
    files: Mapping[str, bytes | str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; it is complete on the disk when this returns, or not there at all.

    `files` travel with the model under their names (tokenizer.json, chat_template.jinja). Every
    process calls this, with a folder that all of them see. Raises `CheckpointError` if the folder
    exists.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder} exists; a checkpoint is never overwritten, choose another")
    partial = folder.with_name(folder.name + folders.PARTIAL)
    items = {folders.PARAMS: arrays.by_path(params)}
    remove_partial(partial)
    try:
        with ocp.Checkpointer(arrays.handler(*items)) as checkpointer:
            checkpointer.save(partial, args=arrays.save_arguments(items))
        if jax.process_index() == 0:
            write_description(partial, config, params, files or {}, provenance or {})
            folders.commit(partial)
    except BaseException:
        remove_partial(partial)
        raise
    wait_for_all(f"saved {folder}")
    return folder


def load(folder: str | Path, layout: Layout | None = None, dtype: Any = None) -> Checkpoint:
    """Read a model from a checkpoint, or the newest good one of a run or `checkpoints/` folder.

    With a `layout` each array is read straight into its shards by the model's rules, otherwise onto
    the first device. `dtype` casts floating dense arrays; a weight format's own arrays keep theirs.
    Raises `CheckpointError` if a named checkpoint is not whole, or its arrays are not those of its
    `model.json`.
    """
    folder = Path(on_first_process(lambda: str(folders.locate(folder).absolute())))
    config, _, names = read_model(folder)
    tree = stored_params(folder)
    check_architecture(folder, config, tree)
    target = _placed(_cast(tree, dtype), config, layout)
    values = arrays.restore(folder / folders.PARAMS, arrays.by_path(target), cast=True)
    params = jax.tree.unflatten(jax.tree.structure(target), list(values.values()))
    provenance = folders.read_json(folder / folders.PROVENANCE)
    return Checkpoint(config, params, folders.read_files(folder, names), provenance, folder)


def stored_params(folder: Path) -> Any:
    """Shapes and dtypes of the params in a checkpoint folder, weight formats rebuilt; reads no
    array.
    """
    found = arrays.stored(folder / folders.PARAMS)
    return from_arrays(from_flat(found), read_model(folder)[1])


def write_description(
    folder: Path,
    config: ModelConfig | None,
    params: Any,
    files: Mapping[str, bytes | str],
    provenance: Mapping[str, Any],
) -> None:
    """Write `model.json`, `provenance.json` and the other small files (one process only)."""
    folders.write_files(folder, files)
    model = {
        "format": 1,
        "config": None if config is None else dataclasses.asdict(config),
        "weights": to_arrays(params)[1],
        "files": sorted(files),
    }
    folders.write_json(folder / folders.MODEL, model)
    folders.write_json(folder / folders.PROVENANCE, dict(provenance))


def read_model(folder: Path) -> tuple[ModelConfig, dict[str, dict[str, Any]], list[str]]:
    """What `model.json` holds: config, weight format at each path, names of other files."""
    path = folder / folders.MODEL
    content = folders.read_json(path)
    try:
        config, description, names = content["config"], content["weights"], content["files"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} lacks one of config, weights, files") from None
    if config is None:
        raise CheckpointError(f"{path}: its params are no decoder's; only their own run reads them")
    return from_json(ModelConfig, config, f"{path}: config"), description, names


def from_json(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """The frozen dataclass whose `asdict` went through JSON; absent fields take their defaults."""
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise CheckpointError(
            f"{where}: unknown field {unknown[0]!r}; nearest: {nearest(unknown[0], hints)}"
        )
    return cls(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        items = typing.get_args(hint)  # (item, ...) or one type for each item
        items = items[:1] * len(value) if Ellipsis in items else items
        return tuple(_typed(item, one) for item, one in zip(items, value, strict=True))
    if isinstance(value, dict):
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        cls = next(option for option in options if dataclasses.is_dataclass(option))
        return from_json(typing.cast(type, cls), value, str(hint))
    return value


def check_config(folder: Path, wanted: ModelConfig) -> None:
    """Raise `CheckpointError` naming the first fields that are not those of the wanted model."""
    found = read_model(folder)[0].resolve()
    wanted = wanted.resolve()
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    differing = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    if differing:
        text = "; ".join(
            f"model.{name} is {getattr(found, name)!r} there, {getattr(wanted, name)!r} here"
            for name in differing[:3]
        )
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(
            f"checkpoint {folder} is of another architecture: {text}{more}; "
            f"use the config of its {folders.MODEL}, or another run folder"
        )


def check_architecture(folder: Path, config: ModelConfig, params: Any) -> None:
    """Raise `CheckpointError` naming the first paths at which the arrays are not those of the
    config.

    A weight format may stand at any path, and layers that are stored unlike be stacked apart
    (`segments_of`); the shapes of dense arrays must agree.
    """
    try:
        segments = segments_of(params, config)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None
    found, wanted = flatten(params), flatten(abstract(config, segments=segments))
    dense = {path: leaf for path, leaf in found.items() if not is_format(leaf)}
    expected = {path: leaf for path, leaf in wanted.items() if path in dense or path not in found}
    arrays.check_arrays(folder, dense, expected, cast=True)
    extra = [path for path in found if path not in wanted]
    if extra:
        raise CheckpointError(
            f"checkpoint {folder} holds {len(extra)} weights that its model has no use for: "
            f"{', '.join(extra[:3])}"
        )


def _cast(params: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> Any:
        dense = isinstance(leaf, jax.ShapeDtypeStruct)
        if dtype is None or not dense or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return from_flat({path: cast(leaf) for path, leaf in flatten(params).items()})


def _placed(params: Any, config: ModelConfig, layout: Layout | None) -> Any:
    if layout is None:
        return params
    shardings = partition(params, rules(config), layout)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )


def remove_partial(partial: Path, seconds: float = 10.0) -> None:
    """Delete what a failed or killed save left behind (process 0 does it); raises nothing.

    Writers of other arrays may be at work for a moment after the first has failed, hence the tries.
    """
    deadline = time.monotonic() + seconds
    while jax.process_index() == 0 and (left := list(partial.parent.glob(f"{partial.name}*"))):
        for entry in left:
            shutil.rmtree(entry, ignore_errors=True)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)


def on_first_process(
    function: Callable[[], str], error: type[Exception] = CheckpointError, limit: int = 4096
) -> str:
    """What `function` gives on process 0, on all; what it raises becomes `error` on all."""
    if jax.process_count() == 1:
        return function()
    failed, text = False, ""
    if jax.process_index() == 0:
        try:
            text = function()
        except Exception as problem:
            failed, text = True, str(problem)
    message = np.zeros(limit, np.uint8)
    encoded = (("!" if failed else "=") + text).encode()[:limit]
    message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message)))
    text = received.rstrip(b"\0").decode(errors="replace")
    if text.startswith("!"):
        raise error(text[1:])
    return text[1:]


def wait_for_all(name: str) -> None:
    """Return once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
