"""From the files of a Hugging Face checkpoint to arrays on a mesh, one tensor at a time.

A stack of layers is made empty on the devices and filled layer by layer, in place. The host reads
just the rows and columns that a device holds, turns them into our orientation as they come, and
sends them. So it never holds more than a tensor being read and one being sent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from model.checkpoint import Checkpoint, save
from model.config import ModelConfig
from model.families.checks import check_files, names_in_files
from model.families.family import Family, config_from_hf
from model.families.hub import resolve
from model.families.keys import FamilyError
from model.families.plan import Source, output_axis, sources, their_order
from model.families.quantized import Settings, read_layers, split_config
from model.families.reader import WeightFiles, open_weights
from model.families.registry import find
from model.families.tensors import Tensor, copy_turned
from model.parameters import rules
from sharding import Layout, partition
from weights import from_flat

Progress = Callable[[int, int, str], None]
"""`(bytes read so far, bytes in all, name of the array)`."""

CHUNK = 512
"""Rows that a thread reads at a time where they have to be turned or picked out."""

THREADS = 8
"""Threads that read and turn one tensor, if there are as many cores."""

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "sheaf_tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Small files that travel with the model, beside `additional_chat_templates/*.jinja`."""
POOLING = "pooling.json"
"""What sentence-transformers' `1_Pooling/config.json` is called in a checkpoint."""


def import_checkpoint(
    source: str | Path,
    to: str | Path | None = None,
    *,
    dtype: Any = None,
    layout: Layout | None = None,
    allow_pickle: bool = False,
    ignore_keys: Iterable[str] = (),
    progress: Progress | None = None,
) -> Checkpoint:
    """Read a Hugging Face checkpoint; with `to`, also write it as a checkpoint of ours.

    Args:
        source: a folder, or `hub:owner/name` with an optional `@revision`.
        to: the checkpoint folder to write, which must not exist.
        dtype: of the dense arrays; None keeps what the files hold.
        layout: where the arrays go; None is the first device.
        allow_pickle: also read `pytorch_model.bin`, with a loader that runs no code.
        ignore_keys: keys of `config.json` that are known not to change numbers.
        progress: called after each piece that was read.

    Raises `FamilyError` for a config or tensors that are not those of a known family, and
    `WeightFilesError` for files that cannot be read.
    """
    folder = resolve(str(source), allow_pickle=allow_pickle)
    ignore_keys = tuple(ignore_keys)
    values, quantized = split_config(read_config(folder), ignore_keys)
    family = find(values, str(folder))
    config = config_from_hf(family, values, ignore_keys)
    with open_weights(folder, allow_pickle=allow_pickle) as files:
        params = read_params(files, family, config, dtype, layout, progress, quantized)
    provenance: dict[str, Any] = {"method": "import", "family": family.name, "source": str(source)}
    if quantized is not None:
        provenance["quantized"] = {"method": quantized.method, **quantized.values}
    if ignore_keys:
        provenance["ignored_keys"] = list(ignore_keys)
    found = Checkpoint(config, params, carried_files(folder), provenance, folder)
    if to is None:
        return found
    written = save(to, config, params, found.files, provenance)
    return dataclasses.replace(found, folder=written)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; raises `FamilyError` naming the file."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FamilyError(f"{path}: no such file; a Hugging Face checkpoint holds one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FamilyError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise FamilyError(f"{path}: holds {type(values).__name__}, not an object")
    return values


def carried_files(folder: Path) -> dict[str, bytes]:
    """The small files that travel with the model; a template of a subfolder keeps its own name."""
    paths = [folder / name for name in CARRIED]
    paths += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    names = {path.name: path for path in paths} | {POOLING: folder / "1_Pooling" / "config.json"}
    return {name: path.read_bytes() for name, path in names.items() if path.is_file()}


def read_params(
    files: WeightFiles,
    family: Family,
    config: ModelConfig,
    dtype: Any = None,
    layout: Layout | None = None,
    progress: Progress | None = None,
    quantized: Settings | None = None,
) -> dict[str, Any]:
    """The params tree of a model from its open files.

    Layers that are `quantized` become weight formats; `dtype` casts the others. Raises
    `FamilyError` before anything is read if names or shapes are not those of the config.
    """
    stored, layers = check_files(files, family, config, quantized)
    plan = sources(family, config)
    wanted = {}
    for source in plan:
        kind = dtype
        if source.path in layers:
            kind = jnp.float32  # stands in until the format is there
        elif dtype is None:
            found = [files.tensors[name].dtype for name in names_in_files(source, stored)]
            kind = functools.reduce(jnp.promote_types, found)
        wanted[source.path] = jax.ShapeDtypeStruct(_stacked_shape(source), jnp.dtype(kind))
    shardings = _shardings(wanted, config, layout)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    arrays, done = {}, 0
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for source in plan:
            leaf = wanted[source.path]
            read = functools.partial(_read, files, stored, pool, source)
            size = leaf.size * leaf.dtype.itemsize
            if quantized is not None and source.path in layers:
                weight = read_layers(files, quantized, source, layers[source.path])
                pieces = [(_place_format(source.path, weight, wanted, config, layout), 1.0)]
            else:
                pieces = _fill(source, leaf, shardings[source.path], read)
            for array, share in pieces:
                arrays[source.path] = array
                if progress is not None:
                    progress(done + int(size * share), total, source.path)
            done += size
    return from_flat(arrays)


def _place_format(
    path: str,
    weight: Any,
    wanted: dict[str, jax.ShapeDtypeStruct],
    config: ModelConfig,
    layout: Layout | None,
) -> Any:
    """A weight format from the host's memory onto its devices."""
    if layout is None:
        return jax.device_put(weight, jax.local_devices()[0])
    shardings = partition(from_flat({**wanted, path: weight}), rules(config), layout)
    for key in path.split("/"):
        shardings = shardings[key]

    def place(leaf: Any, sharding: Sharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, weight, shardings)


def _fill(
    source: Source,
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding,
    read: Callable[..., np.ndarray],
) -> Iterator[tuple[jax.Array, float]]:
    """The array on its devices after each piece that was put into it, and the share that is
    there.
    """
    if source.segment is None:
        raw = _place(leaf.shape, sharding, lambda index: read(0, 0, index))
        yield _cast(sharding, leaf.dtype)(raw), 1.0
        return
    array = _empty(sharding, leaf.shape, leaf.dtype)()
    shards = _expert_shards(sharding, source)
    each = (source.experts or 1) // shards
    shape = source.shape if source.experts is None else (shards, *source.shape)
    inner = _without_layers(sharding, source)
    put = _put(sharding, None if source.experts is None else (shards, each))
    for layer, expert in itertools.product(range(leaf.shape[0]), range(each)):

        def piece(index: tuple[slice, ...], layer=layer, expert=expert) -> np.ndarray:
            if source.experts is None:
                return read(layer, 0, index)
            shard = index[0].indices(shards)[0]
            return read(layer, shard * each + expert, index[1:])[None]

        raw = _place(shape, inner, piece)
        array = put(jax.block_until_ready(array), raw, np.int32(layer), np.int32(expert))
        yield array, (layer * each + expert + 1) / (leaf.shape[0] * each)


def _place(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array whose pieces are read device by device; equal pieces are read once."""
    placed, last, value = {}, None, None
    places = sharding.addressable_devices_indices_map(shape)
    for device, index in sorted(places.items(), key=lambda item: _bounds(item[1], shape)):
        assert index is not None
        if _bounds(index, shape) != last:
            value, last = read(index), _bounds(index, shape)
        placed[device] = jax.device_put(value, device)
    arrays = [placed[device] for device in places]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    assert index is not None
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _read(
    files: WeightFiles,
    stored: dict[str, str],
    pool: ThreadPoolExecutor,
    source: Source,
    layer: int,
    expert: int,
    index: tuple[slice, ...],
) -> np.ndarray:
    """A piece `index` of one layer's array of ours, packed rows taken and turned if need be."""
    start = 0 if source.segment is None else source.segment.start
    name = stored[source.name(start + layer, expert)]
    if source.rows is None and not source.tensor.transposed:
        return files.read(name, index)
    columns = np.arange(source.shape[-1])[index[-1]]
    rows = columns if source.rows is None else source.rows[columns]
    sizes = [len(range(*part.indices(n))) for part, n in zip(index, source.shape, strict=True)]
    piece = np.empty(sizes, jnp.dtype(files.tensors[name].dtype))

    def copy(first: int) -> None:
        chunk = rows[first : first + CHUNK]
        block = _rows(files, name, source.tensor, chunk, index)
        copy_turned(piece[..., first : first + len(chunk)], block, source.tensor.transposed)

    list(pool.map(copy, range(0, len(rows), CHUNK)))
    return piece


def _rows(
    files: WeightFiles, name: str, tensor: Tensor, rows: np.ndarray, index: tuple[slice, ...]
) -> np.ndarray:
    """These rows of their tensor along its output axis; the other axes as `index` of ours says."""
    low, high = int(rows.min()), int(rows.max()) + 1
    block = files.read(name, their_order(tensor, (*index[:-1], slice(low, high))))
    if high - low == len(rows):
        return block
    return np.take(block, rows - low, axis=output_axis(tensor))


@functools.lru_cache(maxsize=256)
def _empty(sharding: Sharding, shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _cast(sharding: Sharding, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda raw: raw.astype(dtype), out_shardings=sharding, donate_argnums=0)


@functools.lru_cache(maxsize=256)
def _put(sharding: Sharding, experts: tuple[int, int] | None) -> Callable[..., Any]:
    """`(stack, raw piece, layer, expert) -> stack` with the piece in place, the stack donated.

    `experts` is how many shards experts are in, and how many each shard has.
    """

    def put(stack: jax.Array, raw: jax.Array, layer: jax.Array, expert: jax.Array) -> jax.Array:
        value = raw.astype(stack.dtype)[None]
        split = stack.shape if experts is None else (len(stack), *experts, *raw.shape[1:])
        at = (layer,) if experts is None else (layer, 0, expert)
        value = value if experts is None else value[:, :, None]
        # As plain bits, since on a CPU XLA would convert a whole bfloat16 stack for each update.
        as_bits = f"uint{8 * stack.dtype.itemsize}"
        bits = jax.lax.bitcast_convert_type(stack, as_bits).reshape(split)
        value = jax.lax.bitcast_convert_type(value, as_bits)
        bits = jax.lax.dynamic_update_slice(bits, value, (*at, *[0] * (len(split) - len(at))))
        return jax.lax.bitcast_convert_type(bits.reshape(stack.shape), stack.dtype)

    return jax.jit(put, out_shardings=sharding, donate_argnums=0)


def _shardings(
    wanted: dict[str, jax.ShapeDtypeStruct], config: ModelConfig, layout: Layout | None
) -> dict[str, Sharding]:
    if layout is None:
        return dict.fromkeys(wanted, SingleDeviceSharding(jax.local_devices()[0]))
    return flatten_shardings(partition(from_flat(wanted), rules(config), layout))


def flatten_shardings(tree: Any) -> dict[str, Sharding]:
    """`{path: sharding}` of a tree of shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Sharding))
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _without_layers(sharding: Sharding, source: Source) -> Sharding:
    """The sharding of one layer of a stack; single heads are small and go everywhere."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    rest = () if source.tensor.by_head else sharding.spec[1:]
    return NamedSharding(sharding.mesh, PartitionSpec(*rest))


def _expert_shards(sharding: Sharding, source: Source) -> int:
    if not source.tensor.by_expert or not isinstance(sharding, NamedSharding):
        return 1
    assert source.experts is not None
    local = sharding.shard_shape((1, source.experts, *source.shape))[1]
    return source.experts // local


def _stacked_shape(source: Source) -> tuple[int, ...]:
    layers = () if source.segment is None else (len(source.segment),)
    return (*layers, *source.whole)
