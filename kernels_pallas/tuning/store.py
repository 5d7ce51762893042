"""Measured choices on disk: a user's cache, and tables that come with Sheaf.

One JSON file a device kind, one choice a line. Writers lock the file beside it, read, add and put
the new file in its place, so readers see the old one or the new one, and no writer loses another's.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels_pallas.tuning.key import Key

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
Blocks = Mapping[str, Any]
"""Name -> whole number, or a name, such as that of a route."""


@dataclass(frozen=True)
class Choice:
    """Block sizes for one bucket, and how they were found.

    code: `key.code_version` of the kernel at the time.
    source: "measured", or "compiled" if only the compiler's figures were compared.
    seconds, default_seconds: median of one call, with these blocks and with the kernel's own.
    device: what measured, in words; jax: its version.
    discarded: candidate -> why it was not in question.
    """

    blocks: Blocks
    code: str
    source: str
    seconds: float | None = None
    default_seconds: float | None = None
    device: str = ""
    jax: str = ""
    discarded: Mapping[str, str] = field(default_factory=dict)


Table = Mapping[Key, Choice]


def cache_file(device_kind: str) -> Path:
    """The user's own file: `$XDG_CACHE_HOME/sheaf/tuning/`, else `~/.cache/sheaf/tuning/`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "sheaf" / "tuning" / f"{_slug(device_kind)}.json"


def shipped_file(device_kind: str) -> Path:
    """The file that comes with Sheaf; there need not be one."""
    return SHIPPED / f"{_slug(device_kind)}.json"


def _slug(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def read(path: Path) -> Table:
    """What a file holds; a file that is not there holds nothing, one that cannot be read is warned
    of once and holds nothing.
    """
    try:
        status = os.stat(path)
    except OSError:
        return {}
    return _parsed(path, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, *version: int) -> Table:
    try:
        held = json.loads(path.read_text("utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']!r}; this Sheaf reads {FORMAT}")
        return dict(_choice(row, held["device_kind"]) for row in held["choices"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} is left aside, and is rebuilt by tuning: {reason}", stacklevel=4)
        return {}


def _choice(row: dict[str, Any], device_kind: str) -> tuple[Key, Choice]:
    key = Key.of(row["kernel"], row["sizes"], row["dtype"], device_kind, **row["options"])
    blocks = row["blocks"]
    if not blocks or not all(isinstance(value, int | str) for value in blocks.values()):
        raise ValueError(f"blocks of {key} are {blocks!r}; expected whole numbers or names")
    rest = {name: row[name] for name in Choice.__dataclass_fields__ if name in row}
    return key, Choice(**rest)


def write(path: Path, table: Table) -> None:
    """Add choices to a file, of one device kind; what it holds for other keys stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        _replace(path, _text({**read(path), **table}))


def _text(table: Table) -> str:
    rows = [_row(key, table[key]) for key in sorted(table, key=str)]
    (device_kind,) = {key.device_kind for key in table}
    head = f'{{"format": {FORMAT}, "device_kind": {json.dumps(device_kind)}, "choices": [\n'
    return head + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"


def _row(key: Key, choice: Choice) -> dict[str, Any]:
    where = {"kernel": key.kernel, "dtype": key.dtype}
    where |= {"options": dict(key.options), "sizes": dict(key.sizes)}
    return {name: value for name, value in (where | vars(choice)).items() if value is not None}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on every platform that looks choices up

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
