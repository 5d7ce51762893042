"""What lies in a checkpoint folder, when it is whole, and how the newest good one is found.

    FOLDER/params/           arrays (Orbax), all that inference reads
    FOLDER/train_state/      the rest of a training state: optimizer, step, rng (training only)
    FOLDER/model.json        ModelConfig, and the weight format at each path
    FOLDER/cursor.json       where the data stood, metrics of the step (training only)
    FOLDER/provenance.json   parents, method, settings, code revision
    FOLDER/tokenizer.json …  files that travel with the model
    FOLDER/commit.json       size and checksum of every file above, written last

A save fills `NAME.partial`, writes `commit.json` last and renames the folder to `NAME`, so a folder
without a valid `commit.json` is one whose save was cut short. A run keeps its checkpoints in
`RUN/checkpoints/STEP`. No JAX here.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COMMIT = "commit.json"
MODEL = "model.json"
CURSOR = "cursor.json"
PROVENANCE = "provenance.json"
PARAMS = "params"
TRAIN_STATE = "train_state"
CHECKPOINTS = "checkpoints"
PARTIAL = ".partial"
REPLACED = ".replaced"
DELETED = ".deleted"
OWN_FILES = frozenset({COMMIT, MODEL, CURSOR, PROVENANCE})

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or read; the message names it and the way out."""


def step_name(step: int) -> str:
    """The folder name of a training step, zero-padded so that names sort as numbers."""
    return f"{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps with a folder under `RUN/checkpoints`, ascending, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new text, never a part."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk, rename."""
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises `CheckpointError` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Put files that travel with the model (tokenizer, chat template) beside the arrays."""
    for name, content in files.items():
        if Path(name).name != name or name in OWN_FILES or name in (PARAMS, TRAIN_STATE):
            raise CheckpointError(
                f"file name {name!r} cannot stand in a checkpoint: it must be a plain name other "
                f"than {', '.join(sorted(OWN_FILES))}, {PARAMS}, {TRAIN_STATE}"
            )
        write_bytes(folder / name, content.encode() if isinstance(content, str) else content)


def read_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The files that `write_files` put there."""
    return {name: (folder / name).read_bytes() for name in names}


def commit(partial: Path, checksums: bool = True) -> Path:
    """Flush every file, write `commit.json`, rename `NAME.partial` to `NAME`, replacing that.

    Once this returns, the checkpoint survives a loss of power. `checksums` reads every file once
    more.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    listing = {}
    for path in _files(partial):
        relative = path.relative_to(partial).as_posix()
        listing[relative] = [path.stat().st_size, _checksum(path) if checksums else None]
        _fsync(path)
    for folder in [entry for entry in partial.rglob("*") if entry.is_dir()]:
        _fsync(folder)
    write_json(partial / COMMIT, {"format": 1, "files": listing})
    _fsync(partial)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def problem(
    folder: Path, parts: Iterable[str] = (PARAMS, TRAIN_STATE), read: bool = True
) -> str | None:
    """Why a checkpoint cannot be used, or None if it is whole.

    Every file must have the size and, with `read`, the checksum of `commit.json`; of the array
    folders only `parts` are looked at.
    """
    if not folder.is_dir():
        return "no such folder"
    if not (folder / COMMIT).is_file():
        return f"half-written: it has no {COMMIT}, which a save writes last"
    try:
        listing: dict[str, list[Any]] = read_json(folder / COMMIT)["files"]
    except (CheckpointError, KeyError, TypeError):
        return f"corrupt: {COMMIT} cannot be read"
    wanted = set(parts)
    names = [name for name in listing if "/" not in name or name.split("/")[0] in wanted]
    wrong_size = (_size_problem(folder, name, listing[name][0]) for name in names)
    return next(filter(None, wrong_size), None) or (
        _checksum_problem(folder, {name: listing[name][1] for name in names}) if read else None
    )


def newest_good(folder: Path, parts: Iterable[str] = (PARAMS, TRAIN_STATE)) -> int | None:
    """The highest step that is whole; a warning names each one that is passed over."""
    for step in reversed(steps(folder)):
        text = problem(folder / step_name(step), parts)
        if text is None:
            return step
        logger.warning("skipped checkpoint %s: %s", folder / step_name(step), text)
    return None


def locate(folder: str | Path, parts: Iterable[str] = (PARAMS,)) -> Path:
    """The verified checkpoint that a run, its `checkpoints/` or a checkpoint folder stands for.

    A run gives its newest good checkpoint. Raises `CheckpointError` for a named checkpoint that is
    not whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    many = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    if steps(many) and not (many / COMMIT).exists():
        step = newest_good(many, parts)
        if step is None:
            raise CheckpointError(f"{many}: none of its checkpoints {steps(many)} is whole")
        return many / step_name(step)
    if not (folder / PARAMS).is_dir() and not (folder / COMMIT).exists():
        raise CheckpointError(
            f"{folder}: neither a run (no {CHECKPOINTS}/ with a saved step) nor a checkpoint "
            f"(no {PARAMS}/)"
        )
    text = problem(folder, parts)
    if text is not None:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {text}")
    return folder


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a kill in between leaves none that
    looks whole.
    """
    doomed = checkpoint.with_name(checkpoint.name + DELETED)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def recover(folder: Path) -> None:
    """Tidy `RUN/checkpoints` after a kill: finish saves that were complete but not renamed, delete
    the others.

    Only for a process that owns the run: a save in progress elsewhere would be deleted.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not entry.is_dir() or PARTIAL not in entry.name:
            continue
        final = entry.with_name(entry.name.split(PARTIAL)[0])
        if entry.name.endswith(PARTIAL) and not final.exists() and problem(entry) is None:
            logger.warning("finished checkpoint %s: its save was complete but not renamed", final)
            os.rename(entry, final)
        else:
            logger.warning("deleted half-written checkpoint %s", entry)
            shutil.rmtree(entry)
    for entry in sorted(folder.glob(f"*{REPLACED}")):
        original = entry.with_name(entry.name.removesuffix(REPLACED))
        shutil.rmtree(entry) if original.exists() else os.rename(entry, original)
    for entry in folder.glob(f"*{DELETED}"):
        shutil.rmtree(entry)


def _size_problem(folder: Path, name: str, size: int) -> str | None:
    if not (folder / name).is_file():
        return f"corrupt: {name} is missing"
    found = (folder / name).stat().st_size
    return None if found == size else f"corrupt: {name} has {found} bytes, {COMMIT} says {size}"


def _checksum_problem(folder: Path, checksums: Mapping[str, int | None]) -> str | None:
    names = [name for name, checksum in checksums.items() if checksum is not None]
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _checksum(folder / name), names)
        wrong = [n for n, value in zip(names, found, strict=True) if value != checksums[n]]
    return f"corrupt: the content of {wrong[0]} does not match its checksum" if wrong else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMMIT)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
