"""Where text comes from: text files, JSON lines, Parquet, the standard library of the running
Python.

`open_source` turns a path, a folder, a glob or `stdlib:` into a `Source`: a fixed, sorted list of
files. Its rows come in one order, each with an id that names file and row, so anything made from a
row can be traced back. A row that cannot be read comes with an error that names file, row and
byte; whether that ends the run or is counted and listed is the caller's choice.
"""

from __future__ import annotations

import bz2
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.files import file_hash
from weights import nearest

FILE_STRIDE = 2**40
"""`row_id = file_index * FILE_STRIDE + row_in_file`."""

STDLIB = "stdlib:"
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PROSE = "txt text md markdown rst tex org log csv tsv html css xml yaml yml toml ini cfg"
_CODE = "py pyi c h cc cpp hpp cu rs go java kt js ts jsx tsx rb php scala swift jl r lua sh sql"
_TEXT_SUFFIXES = frozenset(f".{name}" for name in f"{_PROSE} {_CODE}".split(" "))


class BadRowError(ValueError):
    """A row that cannot be read as text: `file row N (byte B): reason`."""

    def __init__(self, file: str, row: int, byte: int | None, reason: str) -> None:
        self.file, self.row, self.byte, self.reason = file, row, byte, reason
        where = f"{file} row {row:_}" + (f" (byte {byte:_})" if byte is not None else "")
        super().__init__(f"{where}: {reason}")


class SourceError(ValueError):
    """A path that holds nothing readable."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One document: its id, its text or the error if it is bad, bytes of its file read so far."""

    row_id: int
    text: str | None
    error: BadRowError | None = None
    bytes_read: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A sorted list of files read as rows of text.

    `files` are the names that errors and fingerprints use, `paths` where they lie; `ignored`
    counts, by suffix, files of a folder that hold no text. Rows count from 0; blank lines are no
    rows.
    """

    spec: str
    files: tuple[str, ...]
    paths: tuple[str, ...]
    text_key: str = "text"
    rows_by: str = "file"
    ignored: tuple[tuple[str, int], ...] = ()

    def locate(self, row_id: int) -> tuple[str, int]:
        """`(file, row in file)` of a row id."""
        return self.files[row_id // FILE_STRIDE], row_id % FILE_STRIDE

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows in order, from row id `start` on; bad rows come with `text=None` and their
        error.
        """
        first_file, first_row = divmod(start, FILE_STRIDE)
        for number in range(first_file, len(self.files)):
            yield from self._file_rows(number, first_row if number == first_file else 0)

    def read(self, start: int, stop: int) -> list[Row]:
        """Rows [start, stop) of one file, given as row ids; reads that file from its beginning."""
        number = start // FILE_STRIDE
        if (stop - 1) // FILE_STRIDE != number:
            raise ValueError(f"read({start}, {stop}): the rows must be of one file")
        rows = []
        for row in self._file_rows(number, start % FILE_STRIDE):
            if row.row_id >= stop:
                break
            rows.append(row)
        return rows

    def sizes(self) -> list[int]:
        """Bytes of each file as stored."""
        return [os.path.getsize(path) for path in self.paths]

    def fingerprint(self, hashes: Callable[[str], str] | None = None) -> str:
        """SHA-256 over file names, contents and how they are read; `hashes(path)` may answer from
        a cache.
        """
        digest = hashlib.sha256(json.dumps([self.text_key, self.rows_by]).encode())
        for name, path in zip(self.files, self.paths, strict=True):
            digest.update(f"\n{name}\x1f{(hashes or file_hash)(path)}".encode())
        return digest.hexdigest()

    def _file_rows(self, number: int, first_row: int) -> Iterator[Row]:
        name, path = self.files[number], self.paths[number]
        reader = READERS[_kind(path)]
        try:
            for row, (text, byte, reason, done) in enumerate(reader(path, self)):
                if row < first_row:
                    continue
                error = BadRowError(name, row, byte, reason) if reason else None
                yield Row(number * FILE_STRIDE + row, None if error else text, error, done)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise SourceError(f"{path}: cannot be read: {error}") from error


def open_source(
    spec: str, text_key: str = "text", rows: str = "file", stdlib_bytes: int = 0
) -> Source:
    """The files behind `spec`, in sorted order.

    Args:
        spec: a file, a folder (searched to its leaves), a glob, or `stdlib:`.
        text_key: the field of a JSON line or the column of a Parquet file that holds the text.
        rows: what a row of a text file is: "file", "line" or "paragraph" (blank lines between).
        stdlib_bytes: with `stdlib:`, stop before more than so many bytes of files; 0 takes all.

    Raises:
        SourceError: nothing is there, or nothing there is text.
    """
    if rows not in ("file", "line", "paragraph"):
        raise ValueError(f"rows={rows!r}: must be file, line or paragraph")
    if not spec:
        raise SourceError(
            f"data path is empty: give a file, a folder, a glob, or {STDLIB} "
            "(the standard library of this Python)"
        )
    if spec.startswith("stdlib"):
        return _stdlib_source(spec, rows, stdlib_bytes)
    path = os.path.expanduser(spec)
    ignored: Counter[str] = Counter()
    if os.path.isdir(path):
        root = Path(path)
        found = sorted(str(p) for p in root.rglob("*") if p.is_file() and not _hidden(p, root))
        taken = [p for p in found if _kind(p) != "text" or _suffix(p) in _TEXT_SUFFIXES]
        ignored = Counter(_suffix(p) or "no suffix" for p in set(found) - set(taken))
        names = [p[len(path.rstrip(os.sep)) + 1 :] for p in taken]
    elif os.path.isfile(path):
        taken, names = [path], [os.path.basename(path)]
    else:
        taken = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        names = _relative_names(taken)
    if not taken:
        raise SourceError(_nothing_there(path, ignored))
    return Source(spec, tuple(names), tuple(taken), text_key, rows, tuple(sorted(ignored.items())))


def _nothing_there(path: str, ignored: Counter[str]) -> str:
    if os.path.isdir(path):
        held = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items()))
        return (
            f"data path {path!r}: the folder holds no text files (it holds {held or 'nothing'}); "
            "to read other files as text give a glob such as folder/**/*.ext"
        )
    parent = os.path.dirname(path) or "."
    close = nearest(os.path.basename(path), os.listdir(parent)) if os.path.isdir(parent) else ""
    hint = f"; nearest in {parent!r}: {close}" if close else ""
    return f"data path {path!r}: no such file or folder, and no file matches it as a glob{hint}"


def _stdlib_source(spec: str, rows: str, limit: int) -> Source:
    if spec not in ("stdlib", STDLIB):
        raise SourceError(f"data path {spec!r}: the standard library is written {STDLIB!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(
        path
        for path in root.rglob("*.py")
        if not _STDLIB_SKIPPED.intersection(path.relative_to(root).parts)
    )
    names, paths, total = [], [], 0
    for path in found:
        size = path.stat().st_size
        if size == 0 or not _is_utf8(path):
            continue
        if limit and total + size > limit:
            break
        total += size
        names.append(path.relative_to(root).as_posix())
        paths.append(str(path))
    if not names:
        raise SourceError(f"{STDLIB}: no .py files in {root} (within {limit} bytes)")
    return Source(STDLIB, tuple(names), tuple(paths), "text", rows)


def _is_utf8(path: Path) -> bool:
    """Some files of the standard library are in other encodings on purpose."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts)


def _relative_names(paths: list[str]) -> list[str]:
    if len(paths) == 1:
        return [os.path.basename(paths[0])]
    common = os.path.commonpath(paths) if paths else ""
    return [os.path.relpath(path, common) for path in paths]


def _suffix(path: str) -> str:
    """The suffix without compression: `.txt` of `a.txt.gz`."""
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1].lower() if suffix in _COMPRESSIONS else suffix.lower()


def _kind(path: str) -> str:
    suffix = _suffix(path)
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix in (".parquet", ".pq") else "text"


def open_binary(path: str) -> tuple[BinaryIO, BinaryIO]:
    """`(decompressed stream, raw file)`; the raw file's position tells how much has been read."""
    raw = open(path, "rb")  # noqa: SIM115
    suffix = os.path.splitext(path)[1]
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw), raw  # pyright: ignore[reportReturnType]
    if suffix == ".bz2":
        return bz2.BZ2File(raw), raw  # pyright: ignore[reportReturnType]
    if suffix == ".xz":
        return lzma.LZMAFile(raw), raw  # pyright: ignore[reportReturnType]
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd")), raw  # pyright: ignore
    return raw, raw


Fields = tuple[str | None, int | None, str, int]
"""`(text, byte where the row or the fault lies, reason if the row is bad, bytes of the file
read)`.
"""


def _decode(data: bytes, offset: int) -> tuple[str | None, int, str]:
    """`(text, byte, reason)` of UTF-8 bytes that begin at `offset` of their file."""
    zero = data.find(b"\0")
    if zero >= 0:
        return None, offset + zero, "holds a zero byte, so it is binary and not text"
    try:
        return data.decode("utf-8"), offset, ""
    except UnicodeDecodeError as error:
        bad = data[error.start]
        reason = f"not UTF-8: byte 0x{bad:02x} ({error.reason}); convert it, e.g. with iconv"
        return None, offset + error.start, reason


def _read_text(path: str, source: Source) -> Iterator[Fields]:
    stream, raw = open_binary(path)
    with raw, stream:
        if source.rows_by == "file":
            yield (*_decode(_without_bom(stream.read()), 0), raw.tell())
            return
        for offset, block in _blocks(stream, source.rows_by == "paragraph"):
            yield (*_decode(block, offset), raw.tell())


def _blocks(stream: BinaryIO, paragraphs: bool) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, or runs of non-blank lines; blank lines themselves are no rows."""
    offset, begin, held = 0, 0, []
    for line in stream:
        text = _without_bom(line).rstrip(b"\r\n") if offset == 0 else line.rstrip(b"\r\n")
        if held and (not paragraphs or not text.strip()):
            yield begin, b"\n".join(held)
            held = []
        if text.strip():
            begin = offset if not held else begin
            held.append(text)
        offset += len(line)
    if held:
        yield begin, b"\n".join(held)


def _without_bom(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_jsonl(path: str, source: Source) -> Iterator[Fields]:
    stream, raw = open_binary(path)
    offset = 0
    with raw, stream:
        for line in stream:
            body = (_without_bom(line) if offset == 0 else line).rstrip(b"\r\n")
            if body.strip():
                yield (*_parse_line(body, offset, source.text_key), raw.tell())
            offset += len(line)


def _parse_line(line: bytes, offset: int, text_key: str) -> tuple[str | None, int, str]:
    text, byte, reason = _decode(line, offset)
    if text is None:
        return None, byte, reason
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return None, offset + len(text[: error.pos].encode()), f"not JSON: {error.msg}"
    if not isinstance(value, dict):
        return None, offset, f"is a JSON {type(value).__name__}, not an object"
    return (*_text_field(value, text_key, offset),)


def _text_field(row: dict[str, Any], key: str, offset: int) -> tuple[str | None, int, str]:
    if key not in row:
        close = nearest(key, row) or ", ".join(list(row)[:8])
        return None, offset, f"has no field {key!r} (fields near it: {close}); set text_key"
    if not isinstance(row[key], str):
        return None, offset, f"field {key!r} is {type(row[key]).__name__}, not text"
    try:
        row[key].encode()
    except UnicodeEncodeError:
        return None, offset, f"field {key!r} holds a lone surrogate, which UTF-8 cannot encode"
    return row[key], offset, ""


def _read_parquet(path: str, source: Source) -> Iterator[Fields]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise OSError(f"not a Parquet file: {error}") from error
    with file:
        names = file.schema_arrow.names
        if source.text_key not in names:
            raise SourceError(
                f"{path}: no column {source.text_key!r} among {', '.join(names)}; set text_key"
            )
        size, done = os.path.getsize(path), 0
        for batch in file.iter_batches(batch_size=1024, columns=[source.text_key]):
            done += len(batch)
            read = size * done // max(1, file.metadata.num_rows)
            for value in batch.column(0).to_pylist():
                text, _, reason = _text_field({source.text_key: value}, source.text_key, 0)
                yield text, None, reason, read


READERS: dict[str, Callable[[str, Source], Iterator[Fields]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
