"""Tokenised documents on disk: built once, resumed after any interruption, read through `np.memmap`.

    FOLDER/manifest.json                       written last: fingerprints, counts, SHA-256 of every file
    FOLDER/shard-00000/tokens.bin              little-endian uint16 (vocabulary up to 65,536) or uint32
    FOLDER/shard-00000/offsets.npy             int64 [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]]
    FOLDER/shard-00000/rows.npy                int64 [documents, 3]: row id, UTF-8 bytes of the text, hash of the text
    FOLDER/shard-00000/shard.json              counts, bad rows, where the next shard begins

A shard is written beside its place, flushed to disk and renamed, so it is whole or absent. Where a shard ends depends on
the text alone; a build that was killed goes on after its last shard and leaves the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.progress import Progress
from data.sources import BadRowError, Row, Source, SourceError, file_hash
from data.tokenizers import Tokenizer

FORMAT = 1
ENCODE_CHARACTERS = 1_000_000
ARRAYS = ("tokens.bin", "offsets.npy", "rows.npy")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """What, beside source and tokenizer, decides the bytes of a store."""

    add_bos: bool = True
    add_eos: bool = True
    on_bad_row: str = "error"
    shard_tokens: int = 64 * 2**20


class TokenStore:
    """A finished store, opened by its folder; pickles as the folder's name."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        self._dtype = np.dtype(self.manifest["dtype"])
        self._first = np.cumsum([0] + [shard["documents"] for shard in self.manifest["shards"]])

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
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        offsets = self._array(shard, "offsets.npy")
        local = document - self._first[shard]
        begin, end = int(offsets[local]) + start, int(offsets[local + 1])
        return self._tokens(shard)[begin : end if length is None else min(end, begin + length)]

    def row(self, document: int) -> tuple[str, int, int]:
        """`(file, row in file, row id)` of a document."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        row_id = int(self._array(shard, "rows.npy")[document - self._first[shard], 0])
        file, row = divmod(row_id, 2**40)
        return self.manifest["source"]["files"][file], row, row_id

    def _join(self, column: Callable[[int], np.ndarray]) -> np.ndarray:
        columns = [column(shard) for shard in range(len(self.manifest["shards"]))]
        return np.concatenate([np.zeros(0, np.int64), *columns])

    @functools.lru_cache(maxsize=4096)  # noqa: B019 — a store lives as long as the run
    def _array(self, shard: int, name: str) -> np.ndarray:
        return np.load(self.folder / _shard_name(shard) / name, mmap_mode="r")

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def _tokens(self, shard: int) -> np.ndarray:
        path = self.folder / _shard_name(shard) / "tokens.bin"
        if path.stat().st_size == 0:
            return np.zeros(0, self._dtype)
        return np.memmap(path, self._dtype, mode="r")


def store_fingerprint(source: str, tokenizer: str, options: StoreOptions) -> str:
    """The key of a store: fingerprints of source and tokenizer, and the options."""
    parts = [FORMAT, source, tokenizer, dataclasses.asdict(options)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    options: StoreOptions = StoreOptions(),  # noqa: B008 — frozen
    say: Say = print,
    source_fingerprint: str = "",
) -> TokenStore:
    """Build the store in `folder`, go on with one that was interrupted, or open the one that is finished.

    Raises:
        BadRowError: a row cannot be read and `options.on_bad_row` is "error".
        OSError: the disk is full; finished shards stay, and the next call goes on after them.
        ValueError: the folder holds a store of another source, tokenizer or options.
    """
    folder = Path(folder)
    of_source = source_fingerprint or source.fingerprint()
    key = store_fingerprint(of_source, tokenizer.fingerprint, options)
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, say):
            if not (folder / "manifest.json").exists():
                with _full_disk_explained(folder):
                    _build(source, tokenizer, folder, options, say, key, of_source)
    store = TokenStore(folder)
    if store.manifest["fingerprint"] != key:
        raise ValueError(
            f"{folder}: holds tokens of another source, tokenizer or options "
            f"(fingerprint {store.manifest['fingerprint'][:12]}, wanted {key[:12]}); choose another folder"
        )
    return store


def _build(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    options: StoreOptions,
    say: Say,
    key: str,
    of_source: str,
) -> None:
    for leftover in folder.glob("*.partial*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    dtype = "<u2" if tokenizer.vocab_size <= 65_536 else "<u4"
    shards = _finished_shards(folder, key)
    if shards:
        say(f"{source.spec}: {len(shards)} shards are there already, going on after them")
    sizes = np.concatenate([[0], np.cumsum(source.sizes())])
    start = shards[-1]["next_row"] if shards else 0
    with Progress(f"tokenizing {source.spec}", int(sizes[-1]), say) as progress:
        made = [0, 0]
        batches = _encoded(source, tokenizer, options, start)
        while start is not None:
            writer = _ShardWriter(folder, len(shards), dtype)
            start = None
            for batch in batches:
                writer.add(batch)
                made[0] += batch.tokens
                made[1] += len(batch.rows)
                progress.update(int(sizes[batch.last // 2**40]) + batch.bytes_read, *made)
                if writer.tokens >= options.shard_tokens:
                    start = batch.last + 1
                    break
            shards.append(writer.finish(key, start))
    _write_manifest(folder, source, tokenizer, options, key, of_source, dtype, shards, say)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows that were encoded together, and the rows among them that could not be read."""

    rows: list[tuple[int, int, int]]
    ids: list[np.ndarray]
    bad: list[BadRowError]
    tokens: int
    last: int
    bytes_read: int


def _encoded(
    source: Source, tokenizer: Tokenizer, options: StoreOptions, start: int
) -> Iterator[_Batch]:
    """Batches of about a megabyte of text; after a shard ends the next batch begins with its next row."""
    held: list[Row] = []
    characters = 0
    for row in source.rows(start):
        if row.error is not None and options.on_bad_row == "error":
            raise row.error
        held.append(row)
        characters += len(row.text or "") + 1
        if characters >= ENCODE_CHARACTERS:
            yield _encode(source, tokenizer, options, held)
            held, characters = [], 0
    if held:
        yield _encode(source, tokenizer, options, held)


def _encode(source: Source, tokenizer: Tokenizer, options: StoreOptions, rows: list[Row]) -> _Batch:
    good = [(row, row.text) for row in rows if row.text is not None]
    try:
        encoded = tokenizer.encode([text for _, text in good])
    except ValueError:
        for row, text in good:
            _encode_alone(source, tokenizer, row, text)
        raise
    begin = [tokenizer.bos] if options.add_bos and tokenizer.bos is not None else []
    end = [tokenizer.eos] if options.add_eos and tokenizer.eos is not None else []
    ids = [np.concatenate([begin, one, end]) if len(one) else one for one in encoded]
    described = []
    for row, text in good:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        described.append((row.row_id, len(data), int.from_bytes(digest, "little") >> 1))
    bad = [row.error for row in rows if row.error is not None]
    tokens = sum(len(one) for one in ids)
    return _Batch(described, ids, bad, tokens, rows[-1].row_id, rows[-1].bytes_read)


def _encode_alone(source: Source, tokenizer: Tokenizer, row: Row, text: str) -> None:
    try:
        tokenizer.encode([text])
    except ValueError as error:
        file, number = source.locate(row.row_id)
        raise BadRowError(file, number, None, str(error)) from error


class _ShardWriter:
    """One shard on its way to disk."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self._final = folder / _shard_name(number)
        self._partial = folder / f"{_shard_name(number)}.partial"
        self._partial.mkdir()
        self._dtype = np.dtype(dtype)
        self._file = open(self._partial / "tokens.bin", "wb")
        self._lengths: list[int] = []
        self._rows: list[tuple[int, int, int]] = []
        self._bad: list[BadRowError] = []
        self.tokens = 0

    def add(self, batch: _Batch) -> None:
        for ids in batch.ids:
            self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths += [len(ids) for ids in batch.ids]
        self._rows += batch.rows
        self._bad += batch.bad
        self.tokens += batch.tokens

    def finish(self, key: str, next_row: int | None) -> dict[str, Any]:
        _sync(self._file)
        self._file.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        rows = np.array(self._rows, np.int64).reshape(-1, 3)
        for name, array in (("offsets.npy", offsets), ("rows.npy", rows)):
            with open(self._partial / name, "wb") as file:
                np.save(file, array)
                _sync(file)
        description = {
            "fingerprint": key,
            "documents": len(rows),
            "tokens": self.tokens,
            "text_bytes": int(rows[:, 1].sum()),
            "empty": int((offsets[1:] == offsets[:-1]).sum()),
            "next_row": next_row,
            "bad_rows": [[bad.file, bad.row, bad.byte, bad.reason] for bad in self._bad],
            "sha256": {name: file_hash(str(self._partial / name)) for name in ARRAYS},
        }
        _write_json(self._partial / "shard.json", description)
        _sync_folder(self._partial)
        os.rename(self._partial, self._final)
        _sync_folder(self._final.parent)
        return description


def _finished_shards(folder: Path, key: str) -> list[dict[str, Any]]:
    """Descriptions of the shards that are there, in order; one of another store is an error."""
    shards: list[dict[str, Any]] = []
    while (path := folder / _shard_name(len(shards)) / "shard.json").exists():
        shards.append(json.loads(path.read_text()))
        if shards[-1]["fingerprint"] != key:
            raise ValueError(
                f"{path.parent}: belongs to another source, tokenizer or options; choose another folder"
            )
    return shards


def _write_manifest(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    options: StoreOptions,
    key: str,
    of_source: str,
    dtype: str,
    shards: list[dict[str, Any]],
    say: Say,
) -> None:
    bad = [row for shard in shards for row in shard.pop("bad_rows")]
    counts = {
        name: sum(shard[name] for shard in shards)
        for name in ("documents", "tokens", "text_bytes", "empty")
    } | {"bad_rows": len(bad)}
    if counts["tokens"] == 0:
        shutil.rmtree(folder)
        raise SourceError(
            f"{source.spec}: {counts['documents']} rows in {len(source.files)} files hold no text "
            f"({counts['bad_rows']} bad rows)"
        )
    manifest = {
        "format": FORMAT,
        "fingerprint": key,
        "dtype": dtype,
        "counts": counts,
        "options": dataclasses.asdict(options),
        "tokenizer": tokenizer.fingerprint,
        "source": {
            "spec": source.spec,
            "fingerprint": of_source,
            "text_key": source.text_key,
            "rows": source.rows_by,
            "ignored": dict(source.ignored),
            "files": list(source.files),
        },
        "shards": shards,
    }
    if bad:
        lines = (
            json.dumps(dict(zip(("file", "row", "byte", "reason"), row, strict=True)))
            for row in bad
        )
        (folder / "bad_rows.jsonl").write_text("\n".join(lines) + "\n")
        say(
            f"{source.spec}: SKIPPED {len(bad)} of {counts['documents'] + len(bad)} rows that cannot be read, "
            f"listed in {folder / 'bad_rows.jsonl'}"
        )
    _write_json(folder / "manifest.json", manifest)
    _sync_folder(folder)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    with open(partial, "w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        _sync(file)
    os.replace(partial, path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


@contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """One process builds at a time; the kernel frees the lock of one that is killed."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"{folder}: another process is building these tokens, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"cannot write tokens to {folder}: {os.strerror(error.errno)} ({free / 1e6:,.0f} MB free); "
            "free some space or set data.cache_dir to another disk and run again: finished shards are kept",
        ) from error
