"""Find a tokenizer's files and make the tokenizer: `load_tokenizer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from data.tokenizers.json_file import JSON_FILE, MERGES, VOCAB, FileTokenizer, from_vocab_and_merges
from data.tokenizers.own import ByteTokenizer, CharacterTokenizer
from data.tokenizers.protocol import OWN_FILE, Tokenizer
from data.tokenizers.sentencepiece_model import MODEL_FILE, SentencePieceTokenizer
from data.tokenizers.settings import ADDED, CONFIG, SPECIAL_MAP, read_json, read_text

VOCABULARIES = (JSON_FILE, MODEL_FILE, VOCAB, MERGES, OWN_FILE)
BESIDE = (CONFIG, SPECIAL_MAP, ADDED, "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates"


def load_tokenizer(
    source: str | os.PathLike | Mapping[str, bytes], bos: str = "", eos: str = ""
) -> Tokenizer:
    """The tokenizer of a folder, of one of its files, or of files by name (a checkpoint's `files`).

    `tokenizer.json` is read before `tokenizer.model`, and that before `vocab.json` with
    `merges.txt`. `bos` and `eos` are texts of special tokens, in place of those that files name.

    Raises:
        FileNotFoundError: there is no tokenizer at the path.
        ValueError: a file is not what it must be; the message names it.
        ImportError: the sentencepiece library is not installed and `tokenizer.model` needs it.
    """
    if isinstance(source, Mapping):
        return _from_files(tokenizer_files(source), "tokenizer files", bos, eos)
    path = Path(source).expanduser()
    if path.is_dir():
        files = read_folder(path)
    elif path.is_file():
        kind = MODEL_FILE if path.suffix == ".model" else JSON_FILE
        kind = path.name if path.name in VOCABULARIES else kind
        files = {kind: path.read_bytes(), **_others(path)}
    else:
        raise FileNotFoundError(f"tokenizer {str(path)!r}: no such file or folder")
    return _from_files(files, str(path), bos, eos)


def read_folder(folder: str | os.PathLike) -> dict[str, bytes]:
    """The files of a model's folder that make its tokenizer and chat templates, by name.

    `additional_chat_templates/NAME.jinja` is named `NAME.jinja`, as in a checkpoint.
    """
    folder = Path(folder)
    paths = [folder / name for name in (*VOCABULARIES, *BESIDE)]
    paths += [*sorted(folder.glob("*.jinja")), *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def tokenizer_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of a checkpoint's files that make its tokenizer and chat templates."""
    return {name: data for name, data in files.items() if name in VOCABULARIES or _beside(name)}


def _others(path: Path) -> dict[str, bytes]:
    """The files beside a vocabulary that belong to it."""
    found = read_folder(path.parent).items()
    pair = {VOCAB, MERGES}
    return {name: data for name, data in found if _beside(name) or {name, path.name} == pair}


def _beside(name: str) -> bool:
    return name in BESIDE or name.endswith(".jinja")


def _from_files(files: Mapping[str, bytes], where: str, bos: str, eos: str) -> Tokenizer:
    try:
        return _make(files, bos, eos)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _make(files: Mapping[str, bytes], bos: str, eos: str) -> Tokenizer:
    if JSON_FILE in files:
        return FileTokenizer(read_text(files, JSON_FILE), bos, eos, files)
    if MODEL_FILE in files:
        return SentencePieceTokenizer(files, bos, eos)
    if VOCAB in files and MERGES in files:
        return from_vocab_and_merges(files, bos, eos)
    if OWN_FILE in files:
        stored = read_json(files, OWN_FILE)
        return (
            ByteTokenizer()
            if stored["kind"] == "bytes"
            else CharacterTokenizer(stored["characters"])
        )
    raise ValueError(
        f"needs {JSON_FILE} or {MODEL_FILE}, or {VOCAB} with {MERGES}, or {OWN_FILE}; holds "
        f"{', '.join(files) or 'none of them'}"
    )
