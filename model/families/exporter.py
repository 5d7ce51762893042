"""From a checkpoint of ours to a Hugging Face folder, one tensor at a time.

The tensors are the family's own, in their order and packing; a folder that was imported and is
exported again holds the same bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.checkpoint import Checkpoint, load
from model.config import ModelConfig
from model.families.family import Family, config_to_hf
from model.families.importer import POOLING
from model.families.keys import FamilyError
from model.families.plan import (
    Source,
    names,
    output_axis,
    packed_shape,
    sources,
    their_order,
    their_shapes,
)
from model.families.quantized import KEY
from model.families.quantized_export import (
    Entry,
    check_method,
    is_quantized,
    joined,
    left_out,
    plan,
)
from model.families.registry import FAMILIES, by_config
from model.families.tensors import copy_turned
from model.families.writer import write_order, write_weights
from model.segments import segments_of
from sharding import Layout
from weights import dequantize, flatten, is_format, nearest

Progress = Callable[[int, int, str], None]
"""`(bytes written so far, bytes in all, name of the tensor)`."""

SHARD_BYTES = 5_000_000_000
"""The largest weight file, as transformers cuts them."""


def export_checkpoint(
    checkpoint: str | Path | Checkpoint,
    to: str | Path,
    *,
    family: str | None = None,
    dtype: Any = None,
    layout: Layout | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    quantized: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model as a folder that transformers, vLLM and the like load.

    Args:
        checkpoint: a checkpoint or run folder, or a `Checkpoint` at hand.
        to: the folder to write; it must not hold weights already.
        family: the family to write it as; None is the one it was imported from, or else the first
            that can say its config.
        dtype: of the dense tensors; None keeps the arrays'. Weight formats that are written dense
            are in float32 unless a dtype is given.
        layout: where the arrays are while they are written, with a folder.
        max_shard_bytes: the largest weight file.
        quantized: gptq, awq or bitsandbytes: write weight formats as they are, in this layout.
        progress: called after each tensor.

    Raises `FamilyError` naming the fields that the family cannot say, or the layers that the layout
    cannot; `WeightFilesError` if the folder holds weights.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load(checkpoint, layout=layout)
    base = (
        json.loads(checkpoint.files["config.json"]) if "config.json" in checkpoint.files else None
    )
    if quantized is not None:
        check_method(quantized)
    chosen, values = describe_as(checkpoint.config, family, base)
    tensors, kind, settings = _tensors(
        chosen, checkpoint.config, checkpoint.params, dtype, quantized
    )
    values = {**special_ids(checkpoint.files), **values, "torch_dtype": kind}
    values.pop("dtype", None)
    values.pop(KEY, None)
    values.update({} if settings is None else {KEY: settings})
    folder = Path(to).absolute()
    if jax.process_index() != 0:
        makers = {name: make for name, _, _, make in tensors}
        for name in write_order(tensors, max_shard_bytes):
            makers[name]()
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, _watched(tensors, progress), max_shard_bytes=max_shard_bytes)
    for name, content in _small_files(checkpoint, values).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def describe_as(
    config: ModelConfig, family: str | None = None, base: Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that a model is written as, and its `config.json`.

    `base` is the file that the model was imported from. Raises `FamilyError`: the family named
    cannot say the config, or none can (the message gives each one's first reason).
    """
    if family is not None and family not in FAMILIES:
        close = nearest(family, FAMILIES) or ", ".join(FAMILIES)
        raise FamilyError(f"family {family!r} is unknown; nearest: {close}")
    if family is None and base is not None:
        named = by_config(base)
        family = None if named is None else named.name
    if family is not None:
        ours = FAMILIES[FAMILIES[family].written_as or family]
        known = base if base and by_config(base) is ours else None
        return ours, config_to_hf(ours, config, known)
    reasons = []
    for name, candidate in FAMILIES.items():
        try:
            sources(candidate, config)
            return candidate, config_to_hf(candidate, config)
        except FamilyError as error:
            reasons.append(f"{name}: {error}")
    raise FamilyError("no family can say this model; " + "; ".join(reasons))


def _tensors(
    family: Family, config: ModelConfig, params: Any, dtype: Any, quantized: str | None
) -> tuple[list[Entry], str, dict[str, Any] | None]:
    """The tensors, layer by layer, each with its name, shape, dtype and value (made when asked
    for); the dtype of most dense ones; the `quantization_config` if some are in codes.
    """
    arrays = flatten(params)
    shapes = their_shapes(family, config)
    dense: dict[str, Entry] = {}
    layers: dict[str, Callable[[], Any]] = {}
    by_tensor: dict[Any, list[Source]] = {}
    for source in sources(family, config, segments_of(params, config)):
        by_tensor.setdefault((source.tensor.theirs, source.segment), []).append(source)
    for parts in by_tensor.values():
        held = [arrays[part.path] for part in parts]
        if quantized is not None and is_quantized(parts, held, names(parts[0])[0]):
            for index, name in enumerate(names(parts[0])):
                layers[name] = functools.partial(_layer, parts, held, index, name)
            continue
        kind = jnp.dtype(dtype or functools.reduce(jnp.promote_types, map(_dtype, held)))
        for index, name in enumerate(names(parts[0])):
            make = functools.partial(_value, parts, held, index, kind)
            dense[name] = (name, shapes[name], kind, make)
    common, settings, coded = _common_dtype(list(dense.values())), None, {}
    if quantized is not None:
        coded, settings = plan(quantized, layers, common)
        parts = [parts[0] for parts in by_tensor.values()]
        settings = left_out(quantized, settings, parts, layers, _name(family, "head/kernel"))
    tensors = [entry for name in shapes for entry in coded.get(name) or [dense[name]]]
    if config.tied_embeddings and family.stores_tied_head:
        head, table = _name(family, "head/kernel"), _name(family, "embed/table")
        assert head is not None
        assert table is not None
        tensors.append((head, *dense[table][1:]))
    return tensors, common, settings


def _name(family: Family, path: str) -> str | None:
    """Their tensor that is one array of ours, outside the layers; None if the family has none."""
    return next((t.theirs for t in family.tensors if t.ours == (path,)), None)


def _layer(parts: list[Source], held: list[Any], index: int, name: str) -> Any:
    """The weight format of one quantized layer of theirs, on the host."""
    at = () if parts[0].segment is None else (index,)
    return joined(
        parts,
        [jax.tree.map(lambda leaf: _host(leaf, at, None, leaf.dtype), one) for one in held],
        name,
    )


def _value(parts: list[Source], held: list[Any], index: int, dtype: Any) -> np.ndarray:
    """One tensor of theirs on the host."""
    tensor = parts[0].tensor
    packed = np.empty(packed_shape(parts), dtype)
    for part, array in zip(parts, held, strict=True):
        value = _gather(part, array, index, dtype)
        if part.rows is None:
            copy_turned(packed, value, tensor.transposed)
            continue
        turned = np.empty(their_order(tensor, value.shape), dtype)
        copy_turned(turned, value, tensor.transposed)
        at: list[Any] = [slice(None)] * packed.ndim
        at[output_axis(tensor)] = part.rows
        packed[tuple(at)] = turned
    return packed


def _gather(source: Source, array: Any, index: int, dtype: Any) -> np.ndarray:
    """One layer's (and expert's) array of ours on the host, from wherever its pieces are."""
    layer, expert = divmod(index, source.experts or 1)
    at: tuple[int, ...] = () if source.segment is None else (layer,)
    if is_format(array):
        array = dequantize(jax.tree.map(lambda leaf: leaf[at], array), dtype)
        at = ()
    if source.experts is not None:
        at = (*at, expert)
    heads = (source.experts, *source.shape) if source.tensor.by_head else None
    return _host(array, at, heads, dtype)


def _host(array: Any, at: tuple[int, ...], heads: Any, dtype: Any) -> np.ndarray:
    """`array[at]` on the host, from wherever its pieces are."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) and jax.default_backend() == "cpu":
        return _pick(np.asarray(array), at, heads).astype(dtype, copy=False)
    everywhere = None
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    take = _take(heads, jnp.dtype(dtype), everywhere)
    return np.asarray(take(array, tuple(map(jnp.int32, at))))


@functools.lru_cache(maxsize=256)
def _take(heads: Any, dtype: Any, sharding: Any) -> Callable[..., jax.Array]:
    return jax.jit(lambda array, at: _pick(array, at, heads).astype(dtype), out_shardings=sharding)


def _pick(array: Any, at: tuple[Any, ...], heads: tuple[int | None, ...] | None) -> Any:
    """`array[at]`, of an array whose channels are cut into heads if `heads` is given."""
    if heads is not None:
        array = array.reshape(len(array), *heads)
    for place in at:
        array = array[place]
    return array


def _dtype(weight: Any) -> Any:
    return jnp.dtype(jnp.float32) if is_format(weight) else weight.dtype


def _common_dtype(tensors: list[Entry]) -> str:
    """What most values are stored in."""
    sizes: dict[str, int] = {}
    for _, shape, dtype, _ in tensors:
        name = jnp.dtype(dtype).name
        sizes[name] = sizes.get(name, 0) + int(np.prod(shape))
    return max(sizes, key=lambda name: sizes[name])


def _watched(tensors: list[Entry], progress: Progress | None) -> Iterator[Entry]:
    total = sum(int(np.prod(shape)) * jnp.dtype(dtype).itemsize for _, shape, dtype, _ in tensors)
    done = 0

    def watch(name: str, size: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        nonlocal done
        value = make()
        done += size
        if progress is not None:
            progress(done, total, name)
        return value

    for name, shape, dtype, make in tensors:
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        yield name, shape, dtype, functools.partial(watch, name, size, make)


def special_ids(files: Mapping[str, bytes]) -> dict[str, int | None]:
    """`bos_token_id` and `eos_token_id` of the tokenizer files; without a tokenizer they are null,
    since an absent key would mean the family's own default.
    """
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    added = json.loads(files.get("tokenizer.json", b"{}")).get("added_tokens", ())
    ids = {token["content"]: token["id"] for token in added}
    found = {}
    for name in ("bos_token", "eos_token"):
        text = settings.get(name)
        found[f"{name}_id"] = ids.get(text["content"] if isinstance(text, dict) else text)
    return found


def _small_files(checkpoint: Checkpoint, values: dict[str, Any]) -> dict[str, bytes]:
    """`config.json`, the tokenizer's files and the rest that travels with the model."""
    files = {}
    for name, content in checkpoint.files.items():
        extra = name.endswith(".jinja") and name != "chat_template.jinja"
        theirs = "1_Pooling/config.json" if name == POOLING else name
        files[f"additional_chat_templates/{name}" if extra else theirs] = bytes(content)
    files["config.json"] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    return files
