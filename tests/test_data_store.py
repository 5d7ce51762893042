"""The token store: the same bytes however often it is killed, and nothing dropped in silence."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import (
    BadRowError,
    ByteTokenizer,
    CharacterTokenizer,
    SourceError,
    StoreOptions,
    TokenStore,
    open_source,
    tokenize,
)
from data.__main__ import main

ROOT = Path(__file__).parent.parent
OPTIONS = StoreOptions(shard_tokens=100_000)
TEXTS = [f"document {i} " + "words and more words " * (i % 50) for i in range(3000)]


def _write(path: Path, texts: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    return path


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def _quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return _write(tmp_path_factory.mktemp("corpus") / "web.jsonl.gz", TEXTS)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize(open_source(str(corpus)), ByteTokenizer(), folder, OPTIONS, _quiet)
    return folder


def test_documents_come_back_with_their_file_and_row(undisturbed):
    store = TokenStore(undisturbed)
    tokenizer = ByteTokenizer()
    assert len(store) == len(TEXTS)
    assert len(store.manifest["shards"]) > 10
    for document in random.Random(0).sample(range(len(TEXTS)), 50):
        ids = store.tokens(document)
        assert ids[0] == tokenizer.bos
        assert ids[-1] == tokenizer.eos
        assert tokenizer.decode(ids[1:-1]) == TEXTS[document]
        assert np.array_equal(store.tokens(document, 3, 5), ids[3:8])
        assert store.row(document) == ("web.jsonl.gz", document, document)
    assert store.lengths.sum() == store.manifest["counts"]["tokens"]
    assert store.text_bytes.sum() == sum(len(text.encode()) for text in TEXTS)


KILLING = """
import os, random, signal, sys, time, warnings
from data import ByteTokenizer, StoreOptions, open_source, tokenize

warnings.simplefilter("ignore")

class Slow(ByteTokenizer):
    def encode(self, texts, allow_special=False):
        time.sleep(0.02)
        return super().encode(texts, allow_special)

source, draw, killed = open_source(sys.argv[1]), random.Random(), 0
for attempt in range(20):
    child = os.fork()
    if child == 0:
        tokenize(source, Slow(), sys.argv[2], StoreOptions(shard_tokens=100_000))
        os._exit(0)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print(killed)
"""


@pytest.mark.slow
def test_killed_at_twenty_random_instants_it_leaves_the_same_bytes(corpus, undisturbed, tmp_path):
    folder = tmp_path / "tokens"
    run = subprocess.run(
        [sys.executable, "-c", KILLING, str(corpus), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert int(run.stdout.split()[-1]) >= 3
    tokenize(open_source(str(corpus)), ByteTokenizer(), folder, OPTIONS, _quiet)
    assert _hashes(folder) == _hashes(undisturbed)


def test_a_rerun_goes_on_after_the_finished_shards(corpus, undisturbed, tmp_path):
    folder = tmp_path / "tokens"
    tokenize(open_source(str(corpus)), ByteTokenizer(), folder, OPTIONS, _quiet)
    (folder / "manifest.json").unlink()
    for number in (2, 3):
        for path in (folder / f"shard-{number:05d}").iterdir():
            path.unlink()
        (folder / f"shard-{number:05d}").rmdir()
    (folder / "shard-00002.partial").mkdir()
    (folder / "shard-00002.partial" / "tokens.bin").write_bytes(b"half")
    kept = (folder / "shard-00001" / "tokens.bin").stat().st_mtime_ns
    said: list[str] = []
    tokenize(open_source(str(corpus)), ByteTokenizer(), folder, OPTIONS, said.append)
    assert "going on after 2 finished shards" in said[0]
    assert _hashes(folder) == _hashes(undisturbed)
    assert (folder / "shard-00001" / "tokens.bin").stat().st_mtime_ns == kept


def test_a_finished_store_is_opened_and_another_one_refused(corpus, undisturbed):
    before = _hashes(undisturbed)
    source = open_source(str(corpus))
    tokenize(source, ByteTokenizer(), undisturbed, OPTIONS, _quiet)
    assert _hashes(undisturbed) == before
    with pytest.raises(ValueError, match="holds tokens of another source, tokenizer or options"):
        tokenize(source, ByteTokenizer(), undisturbed, StoreOptions(add_eos=False), _quiet)


@pytest.mark.slow
def test_a_full_disk_says_so_and_a_rerun_goes_on(corpus, undisturbed, tmp_path):
    """The limit on file size stands for a full disk: the same call fails the same way."""
    folder = tmp_path / "tokens"
    script = (
        "import resource, signal, sys\n"
        "from data import ByteTokenizer, StoreOptions, open_source, tokenize\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "source = open_source(sys.argv[1])\n"
        "source.fingerprint()\n"
        "class Filling(ByteTokenizer):\n"
        "    batches = 0\n"
        "    def encode(self, texts, allow_special=False):\n"
        "        self.batches += 1\n"
        "        if self.batches == 2:\n"
        "            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit))\n"
        "        return super().encode(texts, allow_special)\n"
        "tokenize(source, Filling(), sys.argv[2], StoreOptions(shard_tokens=100_000))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(corpus), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode != 0
    assert f"cannot write to {folder}" in run.stderr
    assert "a rerun goes on from there" in run.stderr
    assert not (folder / "manifest.json").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
    said: list[str] = []
    tokenize(open_source(str(corpus)), ByteTokenizer(), folder, OPTIONS, said.append)
    assert "going on after 1 finished shards" in said[0]
    assert _hashes(folder) == _hashes(undisturbed)


def test_bad_rows_end_the_run_or_are_counted_and_listed(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\nnot json\n{"text": ""}\n{"text": "two"}\n')
    source = open_source(str(path))
    with pytest.raises(
        BadRowError, match=r"web\.jsonl row 1 \(byte 16\): field 'text' is NoneType"
    ):
        tokenize(source, ByteTokenizer(), tmp_path / "a", say=_quiet)
    said: list[str] = []
    skip = StoreOptions(on_bad_row="skip")
    store = tokenize(source, ByteTokenizer(), tmp_path / "b", skip, said.append)
    assert store.manifest["counts"] == {
        "documents": 3,
        "tokens": 10,
        "text_bytes": 6,
        "empty": 1,
        "bad_rows": 2,
    }
    assert "SKIPPED 2 bad rows of 5" in said[-1]
    listed = [
        json.loads(line) for line in (tmp_path / "b" / "bad_rows.jsonl").read_text().splitlines()
    ]
    assert [(row["row"], row["byte"]) for row in listed] == [(1, 16), (2, 31)]
    assert [store.row(document)[1] for document in range(3)] == [0, 3, 4]


def test_a_row_the_tokenizer_cannot_encode_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc\nabd\n")
    with pytest.raises(BadRowError, match=r"a\.txt row 1: character 'd' at position 2"):
        tokenize(
            open_source(str(path), rows="line"),
            CharacterTokenizer("abc"),
            tmp_path / "s",
            say=_quiet,
        )


def test_a_source_without_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(SourceError, match="1 rows in 1 files hold no text"):
        tokenize(open_source(str(tmp_path / "a.txt")), ByteTokenizer(), tmp_path / "s", say=_quiet)


def test_tokens_take_two_bytes_or_four(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = open_source(str(tmp_path / "a.txt"))
    small = tokenize(source, ByteTokenizer(), tmp_path / "small", say=_quiet)

    class Wide(ByteTokenizer):
        vocab_size = 100_000

        @property
        def fingerprint(self) -> str:
            return "wide"

    wide = tokenize(source, Wide(), tmp_path / "wide", say=_quiet)
    assert (small.tokens(0).dtype, wide.tokens(0).dtype) == (np.uint16, np.uint32)
    assert small.tokens(0).tolist() == wide.tokens(0).tolist() == [256, 120, 257]


def test_the_command_line_builds_a_store(corpus, tmp_path, capsys):
    assert main(["tokenize", str(corpus), "--out", str(tmp_path / "s")]) == 0
    assert "3,000 documents" in capsys.readouterr().out
    assert len(TokenStore(tmp_path / "s")) == 3000
    assert main(["tokenize", str(tmp_path / "none.txt"), "--out", str(tmp_path / "t")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
