"""Sources: the same text in every format, and errors that name file, row and byte."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import BadRowError, SourceError, open_source

TEXTS = [f"Row {i}: grüße, 漢字 🎈, {random.Random(i).random()}" for i in range(500)]


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    lines = "\n".join(TEXTS).encode()
    zstd = pa.compress(_jsonl(TEXTS), codec="zstd", asbytes=True)
    written = {
        "a.txt": lines,
        "crlf.txt": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "a.jsonl": _jsonl(TEXTS),
        "bom.jsonl": b"\xef\xbb\xbf" + _jsonl(TEXTS).replace(b"\n", b"\r\n") + b"\r\n",
        "a.jsonl.gz": gzip.compress(_jsonl(TEXTS)),
        "two.jsonl.gz": gzip.compress(_jsonl(TEXTS[:99])) + gzip.compress(_jsonl(TEXTS[99:])),
        "a.jsonl.bz2": bz2.compress(_jsonl(TEXTS)),
        "a.jsonl.xz": lzma.compress(_jsonl(TEXTS)),
        "a.ndjson.zst": zstd,
    }
    for name, data in written.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet", row_group_size=64)
    return {path.name: path for path in sorted(folder.iterdir())}


def test_the_same_rows_in_ten_formats_read_the_same(formats):
    assert len(formats) == 10
    for name, path in formats.items():
        rows = list(open_source(str(path), rows="line").rows())
        assert [row.text for row in rows] == TEXTS, name
        assert [row.row_id for row in rows] == list(range(500)), name
        assert 0 <= path.stat().st_size - rows[-1].bytes_read <= 2, name


def test_reading_a_range_equals_slicing(formats):
    draw = random.Random(0)
    for _ in range(20):
        name = draw.choice(sorted(formats))
        source = open_source(str(formats[name]), rows="line")
        start, stop = sorted(draw.sample(range(501), 2))
        assert [row.text for row in source.read(start, stop)] == TEXTS[start:stop]
        assert [row.text for row in source.rows(start)] == TEXTS[start:]


def test_a_folder_is_read_in_sorted_order_and_says_what_it_left_out(tmp_path):
    for name in ("b/two.txt", "a.txt", "b/one.md", ".hidden/x.txt", "picture.png", "pack.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = open_source(str(tmp_path))
    assert source.files == ("a.txt", "b/one.md", "b/two.txt")
    assert [row.text for row in source.rows()] == list(source.files)
    assert dict(source.ignored) == {".png": 1, ".zip": 1}
    assert open_source(f"{tmp_path}/b/*").files == ("one.md", "two.txt")
    row = list(source.rows())[2]
    assert source.locate(row.row_id) == ("b/two.txt", 0)


def test_paragraphs_are_rows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\nfirst\r\nstill first\n\n \n second\n\n\nthird")
    texts = [row.text for row in open_source(str(path), rows="paragraph").rows()]
    assert texts == ["first\nstill first", " second", "third"]


def test_the_standard_library_needs_no_download_and_is_bounded():
    source = open_source("stdlib:", stdlib_bytes=500_000)
    assert 0 < sum(source.sizes()) <= 500_000
    assert list(source.files) == sorted(source.files)
    assert not any("test" in name.split("/") or "site-packages" in name for name in source.files)
    assert all(row.text for row in source.rows())


@pytest.mark.parametrize(
    ("line", "byte", "reason"),
    [
        (b'{"text": "unterminated', 9, "not JSON: Unterminated string"),
        (b'{"text": null}', 0, "'text' is NoneType"),
        (b'{"text": 7}', 0, "'text' is int"),
        (b'{"texts": "x"}', 0, "no field 'text' (fields near it: texts)"),
        (b"[1, 2]", 0, "JSON list, not an object"),
        (b'{"text": "\\ud800"}', 0, "lone surrogate"),
        (b'{"text": "\xff\xfe"}', 10, "not UTF-8: byte 0xff"),
        (b'{"text": "\0"}', 10, "zero byte, so it is binary"),
    ],
)
def test_a_bad_row_names_file_row_and_byte(tmp_path, line, byte, reason):
    good = b'{"text": "one"}\n{"text": "two \xc3\xa9"}\n'
    path = tmp_path / "web.jsonl"
    path.write_bytes(good + line + b"\n" + b'{"text": "last"}\n')
    rows = list(open_source(str(path)).rows())
    assert [row.text for row in rows] == ["one", "two é", None, "last"]
    error = rows[2].error
    assert isinstance(error, BadRowError)
    assert reason in str(error)
    assert str(error).startswith(f"web.jsonl row 2 (byte {len(good) + byte})")


def test_null_in_parquet_is_a_bad_row_and_a_missing_column_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x", None, ""]}), path)
    rows = list(open_source(str(path), text_key="body").rows())
    assert [row.text for row in rows] == ["x", None, ""]
    assert "a.parquet row 1" in str(rows[1].error)
    with pytest.raises(SourceError, match="no column 'text' among body"):
        list(open_source(str(path)).rows())
    (tmp_path / "fake.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(SourceError, match="not a Parquet file"):
        list(open_source(str(tmp_path / "fake.parquet")).rows())


def test_binary_and_badly_encoded_text_files_name_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\0binary")
    (tmp_path / "b.txt").write_bytes("grün".encode("latin-1"))
    first, second = (row.error for row in open_source(str(tmp_path)).rows())
    assert "a.txt row 0 (byte 4): holds a zero byte" in str(first)
    assert "b.txt row 0 (byte 2): not UTF-8: byte 0xfc" in str(second)


def test_a_truncated_gzip_is_an_error_naming_the_file(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(_jsonl(TEXTS))[:-500])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(open_source(str(path)).rows())


def test_a_long_line_and_an_empty_file_are_rows(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "long.txt").write_text("x" * 20_000_000)
    empty, long = open_source(str(tmp_path)).rows()
    assert empty.text == ""
    assert long.text is not None
    assert len(long.text) == 20_000_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data path is empty"),
        ("corpus.tx", "nearest in .*: corpus.txt"),
        ("empty", "holds no text files .*it holds nothing"),
        ("pictures", "it holds 1 .png"),
        ("*.jsonl", "no file matches it as a glob"),
        ("stdlib:json", "written 'stdlib:'"),
    ],
)
def test_a_path_with_nothing_to_read_is_an_error(tmp_path, path, message):
    (tmp_path / "corpus.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        open_source(path if path in ("", "stdlib:json") else str(tmp_path / path))


def test_the_fingerprint_follows_content_and_reading(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_source(str(path)).fingerprint()
    assert open_source(str(path)).fingerprint() == first
    assert open_source(str(path), rows="line").fingerprint() != first
    path.write_text("two")
    assert open_source(str(path)).fingerprint() != first
