"""The safetensors format: eight bytes with the header's length, a JSON header, then the arrays.

Read and written here rather than by the safetensors library, which is slower at slices, has no
writer that takes one array at a time, and says less of a broken file. Its files and these are the
same to the byte. Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.families.stored import (
    DTYPES,
    TensorInfo,
    WeightFilesError,
    contiguous,
    refuse_pointer,
)

METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
AGAIN = "download or save it again"

_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The arrays of a safetensors file by name, in the order of their bytes.

    Raises `WeightFilesError` naming file and tensor unless the header is sound and the file has
    exactly the bytes that it announces.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
        refuse_pointer(path, start)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise WeightFilesError(
                f"{path}: not a whole safetensors file: it announces a header of {length} bytes "
                f"and has {size} in all; {AGAIN}"
            )
        file.seek(8)
        header = _parse(path, file.read(length))
    infos = {name: _info(path, name, entry, 8 + length) for name, entry in header.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_extent(path, infos, 8 + length, size)
    return infos


def file_order(dtypes: Mapping[str, np.dtype]) -> list[str]:
    """Names in the order in which the format stores tensors: wide dtypes first, then by name."""
    return sorted(dtypes, key=lambda name: (-_RANKS[dtypes[name]], name.encode()))


def make_header(
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> bytes:
    """The bytes of a file before its arrays, which follow in this order without gaps.

    Padded with spaces so that the arrays start at a multiple of 8.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, shape, dtype in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightFilesError(f"{path}: corrupt header, not JSON ({error}); {AGAIN}") from error
    if not isinstance(header, dict):
        raise WeightFilesError(f"{path}: corrupt header: a {type(header).__name__}, not an object")
    header.pop(METADATA, None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return dict(pairs)


def _info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise WeightFilesError(
            f"{path}: corrupt header: {name} is {json.dumps(entry)[:200]}, wanted dtype, shape and "
            f"data_offsets; {AGAIN}"
        ) from None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise WeightFilesError(
            f"{path}: {name} has dtype {kind!r}, wanted one of {', '.join(DTYPES)}; convert it"
        )
    info = contiguous(shape, DTYPES[kind], path, data + begin)
    if end - begin != info.nbytes:
        raise WeightFilesError(
            f"{path}: corrupt header: {name} is {kind} {list(shape)}, {info.nbytes} bytes, but its "
            f"data_offsets hold {end - begin}; {AGAIN}"
        )
    return info


def _check_extent(path: Path, infos: Mapping[str, TensorInfo], data: int, size: int) -> None:
    """The arrays follow one another without gaps and end where the file ends."""
    end = data
    for name, info in infos.items():
        if info.offset != end:
            raise WeightFilesError(
                f"{path}: corrupt header: {name} begins at byte {info.offset - data}, where "
                f"{end - data} is due; {AGAIN}"
            )
        end += info.nbytes
    if end != size:
        what = "was cut short" if size < end else "has something after its last array"
        raise WeightFilesError(
            f"{path}: {what}: the header says {end} bytes, the file has {size}; {AGAIN}"
        )
