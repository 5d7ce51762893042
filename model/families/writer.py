"""Write a Hugging Face weights folder, one array in memory at a time.

Names, shapes and dtypes are known before the values, so a file's header goes first and each array
is made, written and let go. Files and index are those that transformers' `save_pretrained` writes.
All files are written under another name, flushed, then renamed, the index last.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from model.families.reader import PICKLE, SAFETENSORS
from model.families.safetensors_format import DTYPE_NAMES, METADATA, file_order, make_header
from model.families.stored import WeightFilesError, plain

PARTIAL = ".partial"
FROM_TORCH = types.MappingProxyType({"format": "pt"})
"""The metadata without which transformers refuses a file."""
BLOCK_BYTES = 32 << 20
"""How much of a transposed array is put in order at a time."""


class NewTensor(NamedTuple):
    """An array to write: what it is, and the function that makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: str | Path,
    tensors: Iterable[tuple[str, Sequence[int], Any, Callable[[], np.ndarray]]],
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] = FROM_TORCH,
) -> None:
    """Write `(name, shape, dtype, make)` tensors as `model.safetensors`, or as shards and an index.

    Args:
        folder: made if it does not exist; must not hold weights.
        tensors: in the order in which they fill the shards; each `make` is called once, and its
            result may have any memory order.
        max_shard_bytes: size of the arrays of one file, exceeded only by an array larger than it.
        metadata: free text in each header.

    Raises `WeightFilesError`: weights are there already, names are not unique, a dtype cannot be
    stored, an array is not what was announced, or the disk has too little room. Whatever
    interrupts it, no reader takes what lies there for whole.
    """
    folder = Path(folder)
    planned = _planned(tensors)
    shards = _split(planned, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_existing(folder)
    _check_room(folder, sum(tensor.nbytes for tensor in planned))
    files = _names(len(shards))
    texts = _index(shards, files) if len(shards) > 1 else {}
    with _all_or_none(folder, [*files, *texts]) as partial:
        for name, shard in zip(files, shards, strict=True):
            _write(partial(name), lambda file, shard=shard: _write_shard(file, shard, metadata))
        for name, text in texts.items():
            _write(partial(name), lambda file, text=text: _write_all(file, text.encode()))


def write_order(
    tensors: Iterable[tuple[str, Sequence[int], Any, Callable[[], np.ndarray]]],
    max_shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """The names in the order in which `write_weights` asks for the arrays.

    Processes that do not write must take part in gathering them in the same order.
    """
    shards = _split(_planned(tensors), max_shard_bytes)
    return [tensor.name for shard in shards for tensor in _in_file_order(shard)]


def _planned(
    tensors: Iterable[tuple[str, Sequence[int], Any, Callable[[], np.ndarray]]],
) -> list[NewTensor]:
    planned: dict[str, NewTensor] = {}
    for name, shape, dtype, make in tensors:
        tensor = NewTensor(name, tuple(int(size) for size in shape), np.dtype(dtype), make)
        if name in planned or name == METADATA:
            raise WeightFilesError(f"tensor {name!r}: the name is taken; each must have its own")
        if tensor.dtype not in DTYPE_NAMES:
            known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
            raise WeightFilesError(
                f"tensor {name}: dtype {tensor.dtype} cannot be stored; cast it to one of {known}"
            )
        planned[name] = tensor
    return list(planned.values())


def _split(tensors: Sequence[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """Fill one shard after the other; a tensor larger than a shard gets one of its own."""
    if max_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_bytes}, wanted at least 1")
    shards: list[list[NewTensor]] = []
    current: list[NewTensor] = []
    room = max_bytes
    for tensor in tensors:
        if tensor.nbytes > max_bytes:
            shards.append([tensor])
            continue
        if tensor.nbytes > room:
            shards.append(current)
            current, room = [], max_bytes
        current.append(tensor)
        room -= tensor.nbytes
    return [*shards, current] if current or not shards else shards


def _names(count: int) -> list[str]:
    if count == 1:
        return [SAFETENSORS.single]
    stem, suffix = SAFETENSORS.stem, SAFETENSORS.suffix
    return [f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}" for number in range(count)]


def _index(shards: Sequence[Sequence[NewTensor]], files: Sequence[str]) -> dict[str, str]:
    """The index's file name and text."""
    tensors = [tensor for shard in shards for tensor in shard]
    value = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {
            tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard
        },
    }
    return {SAFETENSORS.index: json.dumps(value, indent=2, sort_keys=True) + "\n"}


def _refuse_existing(folder: Path) -> None:
    for layout in (SAFETENSORS, PICKLE):
        if layout.present(folder):
            raise WeightFilesError(
                f"{folder}: holds weights already ({layout.stem}*.{layout.suffix}); choose another "
                "folder or delete them"
            )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightFilesError(
            f"{folder}: the weights take {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} "
            "GB left; choose another disk or a smaller dtype"
        )


@contextlib.contextmanager
def _all_or_none(folder: Path, names: Sequence[str]) -> Iterator[Callable[[str], Path]]:
    """Give paths to write to; rename them all at the end, or delete them after an error."""
    _delete_partial(folder)
    try:
        yield lambda name: folder / (name + PARTIAL)
    except BaseException:
        _delete_partial(folder)
        raise
    for name in names:
        os.rename(folder / (name + PARTIAL), folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_partial(folder: Path) -> None:
    for path in folder.glob(f"{SAFETENSORS.stem}*.{SAFETENSORS.suffix}*{PARTIAL}"):
        path.unlink()


def _write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    with open(path, "wb", buffering=0) as file:
        fill(file)
        os.fsync(file.fileno())


def _write_shard(file: IO[bytes], shard: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    ordered = _in_file_order(shard)
    _write_all(file, make_header([tensor[:3] for tensor in ordered], metadata))
    for tensor in ordered:
        _write_tensor(file, tensor)


def _in_file_order(shard: Sequence[NewTensor]) -> list[NewTensor]:
    by_name = {tensor.name: tensor for tensor in shard}
    return [by_name[name] for name in file_order({t.name: t.dtype for t in shard})]


def _write_tensor(file: IO[bytes], tensor: NewTensor) -> None:
    array = np.asarray(tensor.make())
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise WeightFilesError(
            f"tensor {tensor.name}: announced as {tensor.dtype} {list(tensor.shape)}, made as "
            f"{array.dtype} {list(array.shape)}"
        )
    for block in _blocks(plain(array)):
        _write_all(file, block.reshape(-1).view(np.uint8).data)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Contiguous pieces in order: the array itself, or copies of a few rows of a transposed one."""
    if array.flags.c_contiguous:
        yield array
        return
    rows = max(1, BLOCK_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


def _write_all(file: IO[bytes], content: bytes | memoryview) -> None:
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[file.write(remaining) :]
