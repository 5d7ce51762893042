"""Weights saved by `torch.save`, read without torch and without running what their pickle asks for.

Such a file is a pickle beside plain storages: a zip since torch 1.6, before that one stream. The
pickle may name the functions that rebuild a tensor, storages and dtypes, and gets stand-ins that
only note where each tensor lies; any other name is refused, so no code of the file ever runs.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from model.families.stored import DTYPES, TensorInfo, WeightFilesError, refuse_pointer

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
STORAGES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
}
NEWER = {
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""Dtypes that have no storage class of their own."""
BYTES = "bytes"


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.known = _known()

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what weights may name."""
        try:
            return self.known[f"{module}.{name}"]
        except KeyError:
            raise WeightFilesError(
                f"{self.path}: its pickle asks for {module}.{name}, which plain weights do not "
                "need; refused, since it could run any code. Use a safetensors copy of the weights"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage by its key; its bytes stay where they are."""
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError(f"a reference to {kind!r}")
        return _Storage(key, dtype)


def read_pickle(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that `torch.save` wrote of a state dict, by name.

    Raises `WeightFilesError` naming the file if it is not whole, asks for more than tensors or
    holds something else.
    """
    with open(path, "rb") as file:
        start = file.read(64)
        refuse_pointer(path, start)
        file.seek(0)
        try:
            state, storages = (_zip if start.startswith(b"PK") else _legacy)(file, path)
            _check_state(path, state)
            size = path.stat().st_size
            return {key: _locate(path, key, state[key], storages, size) for key in state}
        except WeightFilesError:
            raise
        except Exception as error:
            raise WeightFilesError(
                f"{path}: cut short, corrupt or not written by torch.save ({error}); download or "
                "save it again"
            ) from error


def _unpickle(file: IO[bytes], path: Path) -> Any:
    """The next object of a stream, looked through first for what would ask for endless memory."""
    start = file.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        slot = argument if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") else None
        if opcode.name == "BYTEARRAY8" or (slot or 0) > number:
            raise ValueError(f"{opcode.name} {argument}")
    file.seek(start)
    return _Unpickler(file, path).load()


def _known() -> dict[str, Any]:
    """Stand-ins by name, made anew for each file, whose pickle may set attributes of them."""

    def typed(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        return _Tensor(storage, first, shape, strides, _without_metadata(storage.dtype, rest[2:]))

    def untyped(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        return _Tensor(storage, first, shape, strides, _without_metadata(rest[2], rest[3:]))

    return {
        "collections.OrderedDict": collections.OrderedDict,
        "torch._utils._rebuild_tensor": typed,
        "torch._utils._rebuild_tensor_v2": typed,
        "torch._utils._rebuild_tensor_v3": untyped,
        "torch._utils._rebuild_parameter": lambda data, *rest: data,
        "torch.storage.UntypedStorage": BYTES,
        **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
        **{f"torch.{name}": dtype for name, dtype in NEWER.items()},
    }


def _without_metadata(dtype: str, metadata: tuple[Any, ...]) -> str:
    """The dtype; tensors that are conjugated or negated on reading are refused."""
    if any(metadata):
        raise ValueError(f"a tensor with {metadata[0]}")
    return dtype


def _zip(file: IO[bytes], path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """`(state, {storage key: (offset, bytes)})` of a zip."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        (pickled,) = [name for name in entries if name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("its entries are compressed")
        order = f"{root}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        state = _unpickle(io.BytesIO(archive.read(pickled)), path)
    folder = f"{root}data/"
    return state, {
        name.removeprefix(folder): (_start(file, entry), entry.file_size)
        for name, entry in entries.items()
        if name.startswith(folder)
    }


def _start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a zip entry begin: after its local header, whose names vary in length."""
    file.seek(entry.header_offset)
    header = file.read(30)
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + len(header) + sum(lengths)


def _legacy(file: IO[bytes], path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of a file from before torch 1.6: five pickles, then each storage after its count."""
    if _unpickle(file, path) != LEGACY_MAGIC:
        raise ValueError("it does not begin as torch's files do")
    version, system = _unpickle(file, path), _unpickle(file, path)
    if version != LEGACY_VERSION or not system["little_endian"]:
        raise ValueError(f"version {version}, {system}")
    state, keys = _unpickle(file, path), _unpickle(file, path)
    _check_state(path, state)
    widths = {tensor.storage.key: _width(tensor.storage) for tensor in state.values()}
    storages = {}
    for key in keys:
        count = file.read(8)
        if len(count) < 8:
            raise ValueError("it ends before its last storage")
        start, nbytes = file.tell(), int.from_bytes(count, "little") * widths[key]
        storages[key] = start, nbytes
        file.seek(start + nbytes)
    return state, storages


def _width(storage: _Storage) -> int:
    return 1 if storage.dtype == BYTES else DTYPES[storage.dtype].itemsize


def _check_state(path: Path, state: Any) -> None:
    if not isinstance(state, dict):
        raise WeightFilesError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise WeightFilesError(
                f"{path}: {key!r} is a {type(value).__name__}, not a tensor; save the state dict "
                "alone, or as safetensors"
            )


def _locate(
    path: Path, key: str, tensor: _Tensor, storages: Mapping[str, tuple[int, int]], size: int
) -> TensorInfo:
    """Where a tensor lies; raises unless all of it is inside its storage and the file."""
    dtype = DTYPES[tensor.dtype]
    offset, nbytes = storages[tensor.storage.key]
    numbers = (tensor.first, *tensor.shape, *tensor.strides)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{key} has shape {tensor.shape}, strides {tensor.strides}")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    first = tensor.first * dtype.itemsize
    spans = [(n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True)]
    end = first + sum(spans) + dtype.itemsize if 0 not in tensor.shape else 0
    if end > nbytes or offset + nbytes > size:
        raise ValueError(f"{key} ends after its storage of {nbytes} bytes or after the file")
    return TensorInfo(tuple(tensor.shape), np.dtype(dtype), path, offset + first, strides)
