"""The tokenizer that a config asks for: loaded, or trained on its own text and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.files import fingerprint, write_folder
from data.order import key, permute
from data.sources import FILE_STRIDE, Row, Source
from data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
)
from data.tokenizing import Say

FORMAT = 1
LEAST_SHARE = 2**16


def make_tokenizer(
    config: DataConfig, sources: list[Source], fingerprints: list[str], cache: Path, say: Say
) -> Tokenizer:
    """The tokenizer of `config.tokenizer`; a trained one is found again by its text."""
    settings = config.tokenizer
    if settings.kind == "bytes":
        return ByteTokenizer()
    if settings.kind == "file":
        return load_tokenizer(settings.path, settings.bos, settings.eos)
    if settings.kind == "bpe":
        # Not on validation text; a character vocabulary must hold that text's characters too.
        count = len(config.components())
        sources, fingerprints = sources[:count], fingerprints[:count]
    parts = [FORMAT, settings.kind, fingerprints, config.on_bad_row]
    if settings.kind == "bpe":
        parts += [settings.vocab_size, settings.train_bytes]
    folder = cache / "tokenizers" / fingerprint(parts)[:20]
    if not folder.exists():
        say(f"training a tokenizer ({settings.kind}) on {', '.join(s.spec for s in sources)}")
        write_folder(folder, _train(config, sources, say).files())
    return load_tokenizer(folder, settings.bos, settings.eos)


def _train(config: DataConfig, sources: list[Source], say: Say) -> Tokenizer:
    settings = config.tokenizer
    if settings.kind == "characters":
        rows = (row for source in sources for row in source.rows())
        return CharacterTokenizer.train(_text(row, config) for row in rows)
    tokenizer = FileTokenizer.train(_sample(config, sources), settings.vocab_size)
    if tokenizer.vocab_size < settings.vocab_size:
        say(
            f"the text gives a vocabulary of {tokenizer.vocab_size}, less than "
            f"tokenizer.vocab_size={settings.vocab_size}"
        )
    return tokenizer


def _sample(config: DataConfig, sources: list[Source]) -> Iterator[str]:
    """`train_bytes` of text in all, the same share of every file, files in a fixed random order."""
    files = [(source, number) for source in sources for number in range(len(source.files))]
    order = np.atleast_1d(permute(np.arange(len(files)), len(files), key("tokenizer")))
    left = config.tokenizer.train_bytes
    share = max(left // len(files), LEAST_SHARE)
    for source, number in (files[i] for i in order.tolist()):
        quota = min(share, left)
        for row in source.rows(number * FILE_STRIDE):
            if row.row_id // FILE_STRIDE != number or quota <= 0:
                break
            text = _text(row, config)[:quota]
            quota -= len(text)
            left -= len(text)
            yield text
        if left <= 0:
            return


def _text(row: Row, config: DataConfig) -> str:
    if row.error is not None and config.on_bad_row == "error":
        raise row.error
    return row.text or ""
