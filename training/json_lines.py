"""Files of one JSON object a line: appended whole, read past a torn end, cut back on a resume.

Numbers that are not finite are written as the strings "nan", "inf" and "-inf", which every JSON
reader takes and `float` turns back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON; arrays become lists, scalars of NumPy and JAX become numbers."""
    return (json.dumps(plain(row), allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    return str(value)


def append(path: Path, row: Mapping[str, Any], durable: bool = False) -> None:
    """Add a line in one write, so that lines of several threads or processes never mix.

    `durable` returns only when it is on the disk. Raises `OSError` if the disk is full.
    """
    extend(path, [row], durable)


def extend(path: Path, rows: Sequence[Mapping[str, Any]], durable: bool = False) -> None:
    """Add lines as `append` adds one, all in one write."""
    lines = b"".join(encode(row) for row in rows)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, lines)
        if written != len(lines):
            raise OSError(f"{path}: only {written} of {len(lines)} bytes were written; disk full?")
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Row]:
    """All rows but a last line that a kill cut short; raises `ValueError` for other bad lines."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
    return rows


def cut(path: Path, keep: Callable[[Row], bool]) -> list[Row]:
    """Cut the file before its first row that `keep` refuses, or that is torn; the rows cut off."""
    if not path.exists():
        return []
    end = 0
    with open(path, "rb+") as file:
        for line in file:
            row = _row(line)
            if row is None or not keep(row):
                break
            end += len(line)
        file.seek(end)
        removed = [row for line in file if (row := _row(line)) is not None]
        file.truncate(end)
        os.fsync(file.fileno())
    return removed


def _row(line: bytes) -> Row | None:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
