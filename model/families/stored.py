"""Where an array lies in a weights file, and how a slice of it is read: its own bytes, no others.

Both formats, safetensors and torch's pickles, store arrays as plain little-endian elements, so what
the readers of this folder find is the same for both: a file, an offset and strides.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np

POINTER = b"version https://git-lfs"
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""Names of the dtypes in a safetensors header, in the order by which that format sorts tensors."""


class WeightFilesError(RuntimeError):
    """Weights that cannot be found, read or written; names file and key, and the way out."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """An array in a file, not yet read.

    offset: bytes from the start of the file to the first element.
    strides: bytes between neighbours along each axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


def contiguous(shape: tuple[int, ...], dtype: np.dtype, file: Path, offset: int) -> TensorInfo:
    """An array whose elements follow one another, the last axis fastest."""
    strides = [dtype.itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return TensorInfo(shape, dtype, file, offset, tuple(reversed(strides[: len(shape)])))


def read_slice(descriptor: int, info: TensorInfo, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A slice of an array as a new contiguous array; `descriptor` is its open file.

    One run of bytes is read straight into the result. Scattered pieces are copied from a map of
    the file, whose pages the kernel may drop: the process's own memory is the result alone.
    """
    offset, shape, strides = _select(info, index)
    array = np.empty(shape, info.dtype)
    if not array.size:
        return array
    steps = zip(shape, strides, array.strides, strict=True)
    if all(size == 1 or theirs == ours for size, theirs, ours in steps):
        _read_run(descriptor, array, offset, info.file)
    else:
        _read_pieces(descriptor, array, offset, strides, info.file)
    return array


def plain(array: np.ndarray) -> np.ndarray:
    """The same elements as unsigned integers, which NumPy copies several times faster than bfloat16
    or float8.
    """
    return array.view(f"u{array.itemsize}") if array.itemsize <= 8 else array


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise `WeightFilesError` if a file starts like a Git LFS pointer."""
    if start.startswith(POINTER):
        raise WeightFilesError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, "
            "or download it again"
        )


def _select(
    info: TensorInfo, index: tuple[slice, ...]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """`(offset, shape, strides)` of a slice."""
    if len(index) > len(info.shape):
        raise ValueError(f"{len(index)} slices of an array of shape {info.shape}")
    offset, shape, strides = info.offset, list(info.shape), list(info.strides)
    for axis, part in enumerate(index):
        start, stop, step = part.indices(info.shape[axis])
        offset += start * info.strides[axis]
        shape[axis] = len(range(start, stop, step))
        strides[axis] *= step
    return offset, tuple(shape), tuple(strides)


def _read_run(descriptor: int, array: np.ndarray, offset: int, file: Path) -> None:
    remaining = array.reshape(-1).view(np.uint8).data
    while remaining:
        count = os.preadv(descriptor, [remaining], offset)
        if count == 0:
            raise WeightFilesError(f"{file}: became shorter while it was read")
        offset, remaining = offset + count, remaining[count:]


def _read_pieces(
    descriptor: int, array: np.ndarray, offset: int, strides: tuple[int, ...], file: Path
) -> None:
    spans = [(size - 1) * stride for size, stride in zip(array.shape, strides, strict=True)]
    first = offset + sum(min(0, span) for span in spans)
    end = offset + sum(max(0, span) for span in spans) + array.itemsize
    if os.fstat(descriptor).st_size < end:
        raise WeightFilesError(f"{file}: became shorter while it was read")
    start = first - first % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(descriptor, end - start, access=mmap.ACCESS_READ, offset=start) as mapped:
        target = plain(array)
        pieces = np.ndarray(target.shape, target.dtype, mapped, offset - start, strides)
        target[...] = pieces
        del pieces
