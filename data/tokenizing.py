"""From a source to a token store, going on after any interruption and never half done.

A shard is written beside its place, flushed to disk and renamed, so it is whole or absent. Where a
shard ends depends on the text alone. So a build that was killed goes on after its last shard and
leaves the same bytes as one that was not. Documents are encoded in parallel inside the tokenizer,
in order.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.files import file_hash, full_disk_explained, sync, sync_folder, write_json
from data.progress import Progress
from data.sources import FILE_STRIDE, BadRowError, Row, Source, SourceError
from data.store import FORMAT, StoreOptions, TokenStore, shard_folder, store_fingerprint
from data.tokenizers import Tokenizer

BATCH_CHARACTERS = 1_000_000
ARRAYS = ("tokens.bin", "offsets.npy", "rows.npy")
COUNTS = ("documents", "tokens", "text_bytes", "empty")
_NONE = np.zeros(0, np.int64)
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Job:
    source: Source
    tokenizer: Tokenizer
    folder: Path
    options: StoreOptions
    of_source: str
    key: str
    say: Say

    @property
    def dtype(self) -> str:
        return "<u2" if self.tokenizer.vocab_size <= 65_536 else "<u4"


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    options: StoreOptions | None = None,
    say: Say = print,
    source_fingerprint: str = "",
) -> TokenStore:
    """Build the store in `folder`, go on with an interrupted one, or open the one that is finished.

    Raises:
        BadRowError: a row cannot be read and `options.on_bad_row` is "error".
        OSError: the disk is full; finished shards stay, and the next call goes on after them.
        ValueError: the folder holds a store of another source, tokenizer or options.
    """
    folder, options = Path(folder), options or StoreOptions()
    of_source = source_fingerprint or source.fingerprint()
    key = store_fingerprint(of_source, tokenizer.fingerprint, options)
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, say), full_disk_explained(folder):
            if not (folder / "manifest.json").exists():
                _build(_Job(source, tokenizer, folder, options, of_source, key, say))
    store = TokenStore(folder)
    if store.manifest["fingerprint"] != key:
        raise _other_store(folder)
    return store


def _build(job: _Job) -> None:
    shards = _finished_shards(job)
    finished = {shard_folder(job.folder, number) for number in range(len(shards))}
    for leftover in set(job.folder.glob("shard-*")) - finished:
        shutil.rmtree(leftover)
    start = shards[-1]["next_row"] if shards else 0
    if shards:
        job.say(f"tokenizing {job.source.spec}: going on after {len(shards)} finished shards")
    before = np.concatenate([[0], np.cumsum(job.source.sizes())])
    batches = _encoded(job, start) if start is not None else iter(())
    with Progress(f"tokenizing {job.source.spec}", int(before[-1]), job.say) as progress:
        while start is not None:
            with _ShardWriter(shard_folder(job.folder, len(shards)), job) as writer:
                start = None
                for batch in batches:
                    writer.add(batch)
                    done = int(before[batch.last // FILE_STRIDE]) + batch.bytes_read
                    progress.advance(done, batch.tokens, len(batch.rows))
                    if writer.tokens >= job.options.shard_tokens:
                        start = batch.last + 1
                        break
                shards.append(writer.finish(start))
    _finish(job, shards)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows that were encoded together (`rows` are id, bytes, hash), and those that were bad."""

    rows: list[tuple[int, int, int]]
    ids: list[np.ndarray]
    bad: list[BadRowError]
    tokens: int
    last: int
    bytes_read: int


def _encoded(job: _Job, start: int) -> Iterator[_Batch]:
    """Batches of about a megabyte of text (less for small shards), from row id `start` on."""
    enough = min(BATCH_CHARACTERS, job.options.shard_tokens)
    held: list[Row] = []
    characters = 0
    for row in job.source.rows(start):
        if row.error is not None and job.options.on_bad_row == "error":
            raise row.error
        held.append(row)
        characters += len(row.text or "") + 1
        if characters >= enough:
            yield _encode(job, held)
            held, characters = [], 0
    if held:
        yield _encode(job, held)


def _encode(job: _Job, rows: list[Row]) -> _Batch:
    tokenizer, options = job.tokenizer, job.options
    good = [(row, row.text) for row in rows if row.text is not None]
    try:
        encoded = tokenizer.encode([text for _, text in good])
    except ValueError:
        for row, text in good:
            _encode_alone(job, row, text)
        raise
    begin = np.array([tokenizer.bos] if options.add_bos and tokenizer.bos is not None else [], int)
    end = np.array([tokenizer.eos] if options.add_eos and tokenizer.eos is not None else [], int)
    ids = [np.concatenate([begin, one, end]) if len(one) else one for one in encoded]
    described = []
    for row, text in good:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        described.append((row.row_id, len(data), int.from_bytes(digest, "little") >> 1))
    bad = [row.error for row in rows if row.error is not None]
    tokens = sum(map(len, ids))
    return _Batch(described, ids, bad, tokens, rows[-1].row_id, rows[-1].bytes_read)


def _encode_alone(job: _Job, row: Row, text: str) -> None:
    """Find the row of a batch that the tokenizer cannot encode."""
    try:
        job.tokenizer.encode([text])
    except ValueError as error:
        raise BadRowError(*job.source.locate(row.row_id), None, str(error)) from error


class _ShardWriter:
    """One shard on its way to disk."""

    def __init__(self, final: Path, job: _Job) -> None:
        self._final, self._job = final, job
        self._partial = final.with_name(f"{final.name}.partial")
        self._lengths: list[int] = []
        self._rows: list[tuple[int, int, int]] = []
        self._bad: list[BadRowError] = []
        self.tokens = 0

    def __enter__(self) -> _ShardWriter:
        self._partial.mkdir()
        self._file = open(self._partial / "tokens.bin", "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, batch: _Batch) -> None:
        self._file.write(np.concatenate([_NONE, *batch.ids]).astype(self._job.dtype).tobytes())
        self._lengths += map(len, batch.ids)
        self._rows += batch.rows
        self._bad += batch.bad
        self.tokens += batch.tokens

    def finish(self, next_row: int | None) -> dict[str, Any]:
        """Flush, rename, and give the shard's description."""
        sync(self._file)
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        rows = np.array(self._rows, np.int64).reshape(-1, 3)
        for name, array in (("offsets.npy", offsets), ("rows.npy", rows)):
            with open(self._partial / name, "wb") as file:
                np.save(file, array)
                sync(file)
        description = {
            "fingerprint": self._job.key,
            "documents": len(rows),
            "tokens": self.tokens,
            "text_bytes": int(rows[:, 1].sum()),
            "empty": int((offsets[1:] == offsets[:-1]).sum()),
            "next_row": next_row,
            "bad_rows": [[bad.file, bad.row, bad.byte, bad.reason] for bad in self._bad],
            "sha256": {name: file_hash(self._partial / name) for name in ARRAYS},
        }
        write_json(self._partial / "shard.json", description)
        sync_folder(self._partial)
        os.rename(self._partial, self._final)
        sync_folder(self._final.parent)
        return description


def _finished_shards(job: _Job) -> list[dict[str, Any]]:
    """Descriptions of the shards that are there, in order."""
    shards: list[dict[str, Any]] = []
    while (path := shard_folder(job.folder, len(shards)) / "shard.json").exists():
        shards.append(json.loads(path.read_text()))
        if shards[-1]["fingerprint"] != job.key:
            raise _other_store(job.folder)
    return shards


def _finish(job: _Job, shards: list[dict[str, Any]]) -> None:
    """Write the manifest, and the list of bad rows if there are any."""
    bad = [row for shard in shards for row in shard.pop("bad_rows")]
    counts = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    if counts["tokens"] == 0:
        shutil.rmtree(job.folder)
        raise SourceError(
            f"{job.source.spec}: {counts['documents']} rows in {len(job.source.files)} files hold "
            f"no text ({len(bad)} bad rows)"
        )
    if bad:
        listed = job.folder / "bad_rows.jsonl"
        names = ("file", "row", "byte", "reason")
        lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in bad]
        listed.write_text("".join(lines))
        total = counts["documents"] + len(bad)
        job.say(f"{job.source.spec}: SKIPPED {len(bad)} bad rows of {total}, see {listed}")
    source = {
        "spec": job.source.spec,
        "fingerprint": job.of_source,
        "text_key": job.source.text_key,
        "rows": job.source.rows_by,
        "ignored": dict(job.source.ignored),
        "files": list(job.source.files),
    }
    manifest = {
        "format": FORMAT,
        "fingerprint": job.key,
        "dtype": job.dtype,
        "counts": counts | {"bad_rows": len(bad)},
        "options": dataclasses.asdict(job.options),
        "tokenizer": job.tokenizer.fingerprint,
        "source": source,
        "shards": shards,
    }
    write_json(job.folder / "manifest.json", manifest)
    sync_folder(job.folder)


def _other_store(folder: Path) -> ValueError:
    return ValueError(
        f"{folder}: holds tokens of another source, tokenizer or options; choose another folder"
    )


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
