"""Results that were computed once: an SQLite file of an output folder, by request and model.

A key is the SHA-256 of all that an answer depends on: the model's and tokenizer's fingerprints, how
it computes, the code that scores, and the request itself. What belongs together is committed
together, so after `kill -9` only what was under way is computed again.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from evals.task import ANSWERS, Generate, Request, Response
from model.checkpoint import Checkpoint
from model.checkpoint_folder import COMMIT
from weights import to_arrays

FILE = "requests.sqlite"
RESPONSES = {kind.__name__: kind for kind in ANSWERS.values()}
CODE = ("batches.py", "hidden.py", "scoring.py", "spans.py")
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, kind TEXT, response TEXT) STRICT;
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, text TEXT) STRICT;
"""


class Store:
    """The responses of one output folder; a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._database = sqlite3.connect(self.path, timeout=60.0)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(
                f"{self.path}: cannot be read as a store of results ({error}); delete it to "
                "compute all again"
            ) from error

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def get(self, keys: Iterable[str]) -> dict[str, Response]:
        """The responses that are there, by key."""
        found = {}
        for key in keys:
            row = self._database.execute(
                "SELECT kind, response FROM responses WHERE key = ?", (key,)
            ).fetchone()
            if row is not None:
                found[key] = decode(*row)
        return found

    def put(self, responses: Mapping[str, Response]) -> None:
        """Keep responses, all or none of them."""
        rows = [(key, type(each).__name__, encode(each)) for key, each in responses.items()]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", rows)

    def note(self, name: str) -> str | None:
        """A short text that was kept under a name."""
        row = self._database.execute("SELECT text FROM notes WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def keep_note(self, name: str, text: str) -> None:
        """Keep a short text."""
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, text))


def key_of(request: Request, identity: Mapping[str, Any]) -> str:
    """The key of a request to a model with this `identity`, any JSON."""
    asked = {"kind": type(request).__name__, **dataclasses.asdict(request)}
    return sha256(canonical({"model": identity, "request": asked}))


def storable(request: Request) -> bool:
    """Whether the same request has the same answer: drawn texts need a seed for that."""
    return not (isinstance(request, Generate) and request.temperature > 0 and request.seed is None)


def canonical(value: Any) -> bytes:
    """JSON with one spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def sha256(content: bytes) -> str:
    """The hash in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def encode(response: Response) -> str:
    """A response as JSON; arrays keep every bit."""
    fields = {name: _plain(value) for name, value in vars(response).items()}
    return json.dumps(fields, ensure_ascii=False)


def decode(kind: str, text: str) -> Response:
    """What `encode` was given."""
    fields = {name: _value(value) for name, value in json.loads(text).items()}
    return RESPONSES[kind](**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": str(value.dtype), "shape": value.shape, "content": content}
    return value


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["content"]), value["dtype"])
        return flat.reshape(value["shape"])
    return tuple(value) if isinstance(value, list) else value


def model_fingerprint(checkpoint: Checkpoint, store: Store | None = None) -> str:
    """SHA-256 over config and every array (path, dtype, shape, bytes): the same for equal models,
    wherever they lie. With a store it is computed once for a committed folder.
    """
    commit = checkpoint.folder / COMMIT
    name = f"model {sha256(commit.read_bytes())}" if commit.is_file() else ""
    known = store.note(name) if store is not None and name else None
    if known is not None:
        return known
    digest = hashlib.sha256(canonical(dataclasses.asdict(checkpoint.config)))
    arrays, description = to_arrays(checkpoint.params)
    digest.update(canonical(description))
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(arrays), key=_path):
        value = np.asarray(leaf)
        digest.update(f"\n{_path((path, leaf))} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data)
    if store is not None and name:
        store.keep_note(name, digest.hexdigest())
    return digest.hexdigest()


def _path(pair: tuple[Any, Any]) -> str:
    return jax.tree_util.keystr(pair[0])


def code_fingerprint() -> str:
    """SHA-256 of the code that scores, so that other code has other results."""
    folder = Path(__file__).parent
    return sha256(b"".join((folder / name).read_bytes() for name in CODE))
