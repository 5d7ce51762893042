"""Examples from files: JSON lines, a JSON list, or text; gzip or not. Errors name file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.task import Example
from weights import nearest


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """A file's text; `.gz` is unpacked."""
    path = Path(path)
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, names)
        hint = f"; nearest there: {near}" if near else ""
        raise ValueError(f"{path}: no such file{hint}")
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode(encoding)
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as {encoding} text ({error})") from None


def read_examples(path: str | Path, needs: Sequence[str] = ()) -> list[Example]:
    """The objects of a file, `NAME.jsonl` or `NAME.json`; one without `id` gets its number, from 0.

    Raises `ValueError` for what is not JSON, no object, or lacks a field of `needs`.
    """
    text = read_text(path)
    name = str(path).removesuffix(".gz")
    if name.endswith(".json"):
        found = _list(path, text)
        rows = [(f"{path}: entry {place}", value) for place, value in enumerate(found)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(f"{path}: line {n}", _line(path, n, line)) for n, line in lines if line.strip()]
    return [_example(where, value, number, needs) for number, (where, value) in enumerate(rows)]


def _list(path: str | Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: holds a {type(found).__name__}; it must be a list of objects")
    return found


def _line(path: str | Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is not JSON ({error})") from None


def _example(where: str, value: Any, number: int, needs: Sequence[str]) -> Example:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is a {type(value).__name__}; it must be an object")
    for field in needs:
        if field not in value:
            near = nearest(field, value)
            hint = f"; nearest: {near!r}" if near else f"; it has {', '.join(value) or 'none'}"
            raise ValueError(f"{where}: lacks the field {field!r}{hint}")
    return {"id": number, **value}
