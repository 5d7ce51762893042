"""Files that appear whole or not at all, and hashes of large ones that are not read twice."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BIG_FILE = 4 * 2**20


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(file: Any) -> None:
    """Have an open file's bytes on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        sync(file)
    os.replace(partial, path)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files by rename; one that another process made meanwhile is kept."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with open(partial / name, "wb") as file:
            file.write(data)
            sync(file)
    sync_folder(partial)
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Say of a write that found no room where it was and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: cannot write to {folder} ({free:,.0f} MB free); free "
            "some space or set data.cache_dir to another disk; a rerun goes on from there",
        ) from error


class HashCache:
    """`file_hash` that remembers large files by path, size and time of change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, path: str) -> str:
        """SHA-256 of a file's bytes."""
        status = os.stat(path)
        if status.st_size < BIG_FILE:
            return file_hash(path)
        name = f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}"
        if name not in self._known:
            self._known[name] = file_hash(path)
            write_json(self._path, self._known)
        return self._known[name]
