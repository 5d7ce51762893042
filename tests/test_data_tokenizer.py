"""Tokenizers: text comes back, ids are those of the reference, training is deterministic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    ByteTokenizer,
    CharacterTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
    open_source,
)

LINES = [
    line
    for row in open_source("stdlib:", stdlib_bytes=400_000).rows()
    for line in (row.text or "").splitlines()
    if line
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> FileTokenizer:
    return FileTokenizer.train(LINES, 600)


@settings(max_examples=60, deadline=None)
@given(st.lists(UNICODE, min_size=1, max_size=4))
def test_byte_level_tokenizers_give_the_text_back(texts):
    for tokenizer in (ByteTokenizer(), _trained()):
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
            assert ids.dtype == np.int32
            assert tokenizer.decode(ids) == text


_CACHE: list[FileTokenizer] = []


def _trained() -> FileTokenizer:
    if not _CACHE:
        _CACHE.append(FileTokenizer.train(LINES[:2000], 400))
    return _CACHE[0]


@settings(max_examples=60, deadline=None)
@given(UNICODE)
def test_a_stream_never_shows_half_a_character(text):
    for tokenizer in (ByteTokenizer(), _trained()):
        stream = tokenizer.decode_stream()
        shown = ""
        for token in tokenizer.encode([text])[0]:
            piece = stream.push(token)
            assert text.startswith(shown + piece)
            shown += piece
        assert shown + stream.flush() == text


def test_a_stream_of_broken_bytes_goes_on():
    for tokenizer in (ByteTokenizer(), _trained()):
        stream = tokenizer.decode_stream()
        broken = tokenizer.encode(["é"])[0][:1]
        ids = [*broken, *tokenizer.encode(["abcdef"])[0]]
        assert "".join(stream.push(i) for i in ids) + stream.flush() == "\ufffdabcdef"


def test_training_twice_gives_the_same_file(bpe):
    assert FileTokenizer.train(LINES, 600).files() == bpe.files()
    script = (
        "from tests.test_data_tokenizer import LINES; from data import FileTokenizer;"
        "print(FileTokenizer.train(LINES, 600).fingerprint)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env={"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"},
    ).stdout
    assert printed.strip() == bpe.fingerprint


@pytest.mark.interop
def test_ids_equal_transformers_on_two_thousand_lines(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, data in bpe.files().items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    lines = LINES[:2000]
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in ours.encode(lines)] == expected
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.decode(expected[0]) == theirs.decode(expected[0])


def test_special_tokens_in_text_are_text_unless_allowed(bpe):
    text = "a<|eos|>b<|bos|>"
    for tokenizer in (ByteTokenizer(), bpe):
        plain = tokenizer.encode([text])[0].tolist()
        special = tokenizer.encode([text], allow_special=True)[0].tolist()
        assert not {tokenizer.bos, tokenizer.eos} & set(plain)
        assert special.count(tokenizer.eos) == special.count(tokenizer.bos) == 1
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text
        assert tokenizer.encode([text])[0].tolist() == plain


def test_every_kind_comes_back_from_its_files(bpe, tmp_path):
    text = "ab ba\n"
    for tokenizer in (ByteTokenizer(), CharacterTokenizer(text), bpe):
        assert isinstance(tokenizer, Tokenizer)
        again = load_tokenizer(tokenizer.files())
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode([text])[0].tolist() == tokenizer.encode([text])[0].tolist()
        assert (again.bos, again.eos, again.vocab_size) == (
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.vocab_size,
        )


def test_characters_are_numbered_in_order_and_unknown_ones_named():
    tokenizer = CharacterTokenizer.train(["hello", "漢字\n"])
    assert tokenizer.vocab_size == 7
    assert tokenizer.decode(range(7)) == "\nehlo字漢"
    assert tokenizer.encode(["hello"])[0].tolist() == [2, 1, 3, 3, 4]
    with pytest.raises(ValueError, match="character 'z' at position 2 is not one of the 7"):
        tokenizer.encode(["hezo"])


def test_a_path_without_a_tokenizer_says_so(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"needs tokenizer\.json or"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"not a usable tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"'<s>' is not in the tokenizer; .*<\|bos\|>"):
        load_tokenizer(bpe.files(), bos="<s>")
