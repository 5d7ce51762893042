"""Tokenised documents on disk, read through `np.memmap`; `data.tokenizing` writes them.

manifest.json             fingerprints, counts, SHA-256 of every file; written last
shard-00000/tokens.bin    little-endian uint16 (vocabulary up to 65,536) or uint32
shard-00000/offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
shard-00000/rows.npy      int64 [documents, 3]: row id, UTF-8 bytes and hash of the text
shard-00000/shard.json    counts, bad rows, where the next shard begins
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.files import fingerprint
from data.sources import FILE_STRIDE

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """What, beside source and tokenizer, decides the bytes of a store.

    add_bos: put the tokenizer's beginning token before each document that is not empty.
    add_eos: put its end token after each document that is not empty.
    on_bad_row: "error", or "skip" to leave bad rows out, counted and listed.
    shard_tokens: a shard ends with the first batch of rows that reaches so many tokens.
    """

    add_bos: bool = True
    add_eos: bool = True
    on_bad_row: str = "error"
    shard_tokens: int = 64 * 2**20


def store_fingerprint(source: str, tokenizer: str, options: StoreOptions) -> str:
    """The key of a store: fingerprints of source and tokenizer, and the options."""
    return fingerprint([FORMAT, source, tokenizer, dataclasses.asdict(options)])


def shard_folder(folder: Path, number: int) -> Path:
    """Where a shard of a store lies."""
    return folder / f"shard-{number:05d}"


class TokenStore:
    """A finished store, opened by its folder; pickles as the folder's name."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        self._dtype = np.dtype(self.manifest["dtype"])
        self._first = np.cumsum([0] + [shard["documents"] for shard in self.manifest["shards"]])
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        """Documents, empty ones included."""
        return int(self._first[-1])

    def __reduce__(self) -> tuple:
        return TokenStore, (self.folder,)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return self._join(lambda shard: np.diff(self._array(shard, "offsets.npy")))

    @property
    def row_ids(self) -> np.ndarray:
        """Row id of each document, int64."""
        return self._join(lambda shard: self._array(shard, "rows.npy")[:, 0])

    @property
    def text_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64."""
        return self._join(lambda shard: self._array(shard, "rows.npy")[:, 1])

    @property
    def hashes(self) -> np.ndarray:
        """63-bit hash of each document's text, int64."""
        return self._join(lambda shard: self._array(shard, "rows.npy")[:, 2])

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [start, start + length) of a document, a read-only view."""
        shard, local = self._locate(document)
        offsets = self._array(shard, "offsets.npy")
        begin, end = int(offsets[local]) + start, int(offsets[local + 1])
        if length is not None:
            end = min(end, begin + length)
        return self._array(shard, "tokens.bin")[begin:end]

    def row(self, document: int) -> tuple[str, int, int]:
        """`(file, row in file, row id)` of a document."""
        shard, local = self._locate(document)
        row_id = int(self._array(shard, "rows.npy")[local, 0])
        file, row = divmod(row_id, FILE_STRIDE)
        return self.manifest["source"]["files"][file], row, row_id

    def _locate(self, document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return shard, document - int(self._first[shard])

    def _join(self, column: Callable[[int], np.ndarray]) -> np.ndarray:
        columns = [column(shard) for shard in range(len(self.manifest["shards"]))]
        return np.concatenate([np.zeros(0, np.int64), *columns])

    def _array(self, shard: int, name: str) -> np.ndarray:
        if (shard, name) not in self._open:
            path = shard_folder(self.folder, shard) / name
            if name == "tokens.bin" and path.stat().st_size == 0:
                self._open[shard, name] = np.zeros(0, self._dtype)
            elif name == "tokens.bin":
                self._open[shard, name] = np.memmap(path, self._dtype, mode="r")
            else:
                self._open[shard, name] = np.load(path, mmap_mode="r")
        return self._open[shard, name]
