"""The weights of a Hugging Face folder: what is in them, and any slice, without reading the rest.

    with open_weights(folder) as files:
        files.tensors["lm_head.weight"].shape
        files.read("lm_head.weight", (slice(0, 512),))

A folder holds one file, or several shards with an index that says which tensor is where. Whatever
does not fit together is an error before anything is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.families.safetensors_format import read_header
from model.families.stored import TensorInfo, WeightFilesError, read_slice, refuse_pointer
from model.families.torch_format import read_pickle
from weights import nearest

__all__ = ["TensorInfo", "WeightFiles", "WeightFilesError", "open_weights"]


@dataclasses.dataclass(frozen=True)
class Format:
    """The file names of a format, and how the tensors of one file are found."""

    stem: str
    suffix: str
    tensors: Callable[[Path], dict[str, TensorInfo]]

    @property
    def single(self) -> str:
        """All weights in one file."""
        return f"{self.stem}.{self.suffix}"

    @property
    def index(self) -> str:
        """Which shard each tensor is in."""
        return f"{self.single}.index.json"

    def shards(self, folder: Path) -> dict[Path, tuple[int, int]]:
        """`{file: (number, of how many)}` of the files that are named as shards."""
        name = re.compile(rf"{self.stem}-(\d+)-of-(\d+)\.{self.suffix}")
        found = {path: name.fullmatch(path.name) for path in sorted(folder.iterdir())}
        return {path: (int(m[1]), int(m[2])) for path, m in found.items() if m and path.is_file()}

    def present(self, folder: Path) -> bool:
        """Whether the folder has files of this format."""
        named = (folder / self.single).exists() or (folder / self.index).exists()
        return named or bool(self.shards(folder))


SAFETENSORS = Format("model", "safetensors", read_header)
PICKLE = Format("pytorch_model", "bin", read_pickle)


class WeightFiles:
    """The weights of a folder, open for reading, by several threads if need be.

    tensors: what is there, by name, file after file.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]):
        self.folder = folder
        self.tensors = dict(tensors)
        paths = dict.fromkeys(info.file for info in self.tensors.values())
        with contextlib.ExitStack() as stack:
            self._files = {p: stack.enter_context(open(p, "rb", buffering=0)) for p in paths}
            self._stack = stack.pop_all()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the slice of it that NumPy's `tensor[index]` is, as a new array.

        Reads the bytes of the slice only. Raises `WeightFilesError` for an unknown name.
        """
        info = self.tensors.get(name)
        if info is None:
            close = nearest(name, self.tensors)
            raise WeightFilesError(f"{self.folder}: no tensor {name!r}; the nearest are: {close}")
        return read_slice(self._files[info.file].fileno(), info, index)

    def close(self) -> None:
        """Close the files; arrays that were read stay valid."""
        self._stack.close()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_weights(folder: str | Path, allow_pickle: bool = False) -> WeightFiles:
    """Open the weights of a folder; only headers are read.

    Args:
        folder: holds `model.safetensors`, or shards `model-00001-of-0000N.safetensors` with
            `model.safetensors.index.json`, or the same as `pytorch_model.bin`.
        allow_pickle: read `.bin` files, if there are no safetensors.

    Raises `WeightFilesError` for a folder without weights, or whose files are not whole or do not
    fit together; it names file and tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightFilesError(f"{folder}: no such folder")
    form = _format(folder, allow_pickle)
    shards = form.shards(folder)
    if (folder / form.index).exists():
        tensors = _indexed(folder, form)
    elif (folder / form.single).exists():
        _refuse(shards, f"stands beside {form.single}: two sets of weights")
        tensors = form.tensors(folder / form.single)
    else:
        _check_numbers(folder, form, shards)
        tensors = _merged(form, shards)
    return WeightFiles(folder, tensors)


def _format(folder: Path, allow_pickle: bool) -> Format:
    if SAFETENSORS.present(folder):
        return SAFETENSORS
    if not PICKLE.present(folder):
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise WeightFilesError(
            f"{folder}: no weights: it has neither {SAFETENSORS.single}, nor {SAFETENSORS.index}, "
            f"nor {PICKLE.single}; there is: {there}"
        )
    if not allow_pickle:
        raise WeightFilesError(
            f"{folder}: its weights are pickles ({PICKLE.single}), which can hold code; use a "
            "safetensors copy, or read them with --allow-pickle (allow_pickle=True), by a loader "
            "that runs none of it"
        )
    return PICKLE


def _indexed(folder: Path, form: Format) -> dict[str, TensorInfo]:
    """The tensors of the shards that an index names, which must agree with it."""
    index = folder / form.index
    files = _weight_map(index)
    named = {name: folder / name for name in sorted(set(files.values()))}
    for name, path in named.items():
        if not path.is_file():
            example = next(tensor for tensor, file in files.items() if file == name)
            raise WeightFilesError(
                f"{index} names {name} (for {example}), which is missing; download it"
            )
    others = [*form.shards(folder), *_existing(folder / form.single)]
    _refuse([p for p in others if p.name not in named], f"is not in {form.index}")
    tensors = _merged(form, named.values())
    _check_index(index, files, tensors)
    return tensors


def _check_index(index: Path, files: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Each tensor must be in the file that the index says, and in the index."""
    for name in [*files, *tensors]:
        said = files.get(name, "no file")
        found = tensors[name].file.name if name in tensors else "no file"
        if said != found:
            raise WeightFilesError(
                f"{index} does not fit its shards: it says that {name} is in {said}, but it is in "
                f"{found}; download both again, or delete the index if the shards are right"
            )


def _weight_map(index: Path) -> dict[str, str]:
    """`{tensor: file name}` of an index."""
    content = index.read_bytes()
    refuse_pointer(index, content)
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightFilesError(f"{index}: not JSON ({error}); download it again") from error
    files = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not files:
        raise WeightFilesError(f"{index}: has no weight_map of tensor names to file names")
    for tensor, name in files.items():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise WeightFilesError(
                f"{index}: weight_map has {name!r} for {tensor}, wanted a plain file name"
            )
    return files


def _merged(form: Format, paths: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in form.tensors(path).items():
            if name in tensors:
                raise WeightFilesError(
                    f"{path}: has {name}, and so has {tensors[name].file.name}; one of them "
                    "belongs to other weights: delete it"
                )
            tensors[name] = info
    return tensors


def _check_numbers(folder: Path, form: Format, shards: Mapping[Path, tuple[int, int]]) -> None:
    """Without an index, shards must be 1 to N of one N."""
    counts = sorted({count for _, count in shards.values()})
    missing = set(range(1, counts[-1] + 1)) - {number for number, _ in shards.values()}
    if len(counts) > 1 or missing or len(shards) != counts[0]:
        names = ", ".join(path.name for path in shards)
        raise WeightFilesError(
            f"{folder}: has no {form.index}, and its shards are not 1 to N of one N: {names}; "
            "download the others and the index"
        )


def _existing(path: Path) -> list[Path]:
    return [path] if path.exists() else []


def _refuse(paths: Iterable[Path], why: str) -> None:
    for path in paths:
        raise WeightFilesError(f"{path} {why}; delete or move what does not belong to the model")
