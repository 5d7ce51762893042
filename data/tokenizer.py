"""Text to ids and back: bytes, characters, and Hugging Face `tokenizer.json` files.

A tokenizer never adds tokens of its own: the store (data/store.py) puts the beginning and end of a
document, so they cannot be doubled. Special tokens written out in text are ordinary text unless
the caller allows them. `files()` is what a checkpoint keeps and `load_tokenizer` reads back; the
fingerprint is over those files.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

Ids = np.ndarray
REPLACEMENT = "\ufffd"
BOS, EOS = "<|bos|>", "<|eos|>"
OWN_FILE = "sheaf_tokenizer.json"
_USUAL_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
_USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|im_end|>")


@runtime_checkable
class Tokenizer(Protocol):
    """What every backend gives; ids are int32, `bos` and `eos` are None where there is none."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        ...

    @property
    def bos(self) -> int | None:
        """The token before a document."""
        ...

    @property
    def eos(self) -> int | None:
        """The token after a document."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        ...

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text; special tokens written in a text are ordinary text unless allowed."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out; invalid UTF-8 becomes U+FFFD."""
        ...

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        ...

    def files(self) -> dict[str, bytes]:
        """The files that make this tokenizer again, by name."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files."""
        ...


class DecodeStream:
    """Text piece by piece: `push(id)` gives what is certain and holds back incomplete UTF-8."""

    LONGEST_CHARACTER = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is incomplete."""
        before = self._tokenizer.decode(self._ids[: self._shown])
        self._ids.append(int(token))
        after = self._tokenizer.decode(self._ids)
        waiting = len(self._ids) - self._shown < self.LONGEST_CHARACTER
        if after.endswith(REPLACEMENT) and waiting:
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return after[len(before) :]

    def flush(self) -> str:
        """Whatever is still held back, incomplete characters as U+FFFD."""
        before = self._tokenizer.decode(self._ids[: self._shown])
        rest = self._tokenizer.decode(self._ids)[len(before) :]
        self._ids, self._shown = [], 0
        return rest


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then `<|bos|>` 256 and `<|eos|>` 257; needs no training."""

    vocab_size = 258
    bos = 256
    eos = 257

    def __init__(self) -> None:
        self.special_tokens = {BOS: 256, EOS: 257}

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text."""
        if allow_special:
            return [_encode_with_special(self, text) for text in texts]
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        names = {index: name.encode() for name, index in self.special_tokens.items()}
        data = b"".join(names[i] if i > 255 else bytes((i,)) for i in map(int, ids))
        return data.decode("utf-8", errors="replace")

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return _ByteStream(self)

    def files(self) -> dict[str, bytes]:
        """One small file that names the kind."""
        return {OWN_FILE: _json({"kind": "bytes"})}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files."""
        return fingerprint(self.files())


class _ByteStream(DecodeStream):
    """Exact for bytes, also for invalid ones: the standard incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if token > 255:
            return self._decoder.decode(b"", final=True) + self._tokenizer.decode([token])
        return self._decoder.decode(bytes((token,)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class CharacterTokenizer:
    """One id a character, in code-point order, no specials (nanoGPT's Shakespeare has 65).

    A character outside the vocabulary is an error that names it.
    """

    bos = None
    eos = None

    def __init__(self, characters: str) -> None:
        self._codes = np.array(sorted({ord(c) for c in characters}), np.int64)
        if not len(self._codes):
            raise ValueError("a character vocabulary needs text, and the text is empty")
        self.special_tokens: dict[str, int] = {}
        self.vocab_size = len(self._codes)

    @staticmethod
    def train(texts: Iterable[str]) -> CharacterTokenizer:
        """The vocabulary of all characters in `texts`."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return CharacterTokenizer("".join(seen))

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text."""
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> Ids:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        wrong = np.flatnonzero(self._codes[ids] != codes)
        if len(wrong):
            raise ValueError(
                f"character {text[wrong[0]]!r} at position {wrong[0]} is not one of the "
                f"{self.vocab_size} of this vocabulary; train it on that text too, or use bytes"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return "".join(chr(self._codes[int(i)]) for i in ids)

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return DecodeStream(self)

    def files(self) -> dict[str, bytes]:
        """One small file with the characters."""
        characters = "".join(chr(code) for code in self._codes)
        return {OWN_FILE: _json({"kind": "characters", "characters": characters})}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files."""
        return fingerprint(self.files())


class FileTokenizer:
    """A Hugging Face `tokenizer.json`, loaded or trained; `bos` and `eos` are given or found."""

    def __init__(self, tokenizer_json: str, bos: str = "", eos: str = "") -> None:
        self._json = tokenizer_json
        self._tokenizer = RustTokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in sorted(added.items()) if t.special}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._bos, self.bos = self._find(bos, _USUAL_BOS)
        self._eos, self.eos = self._find(eos, _USUAL_EOS)

    def _find(self, given: str, usual: tuple[str, ...]) -> tuple[str, int | None]:
        if given and self._tokenizer.token_to_id(given) is None:
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(
                f"token {given!r} is not in the tokenizer; its special tokens: {known}"
            )
        name = given or next((name for name in usual if name in self.special_tokens), "")
        return name, self._tokenizer.token_to_id(name) if name else None

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
        """Byte-level BPE (GPT-2's split, `<|bos|>`, `<|eos|>`); the same texts give the same
        file.
        """
        tokenizer: Any = RustTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "special_tokens": [BOS, EOS],
            "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
            "show_progress": False,
        }
        trainer = trainers.BpeTrainer(**options)
        tokenizer.train_from_iterator(texts, trainer)
        return FileTokenizer(tokenizer.to_str())

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text, in parallel over texts."""
        self._tokenizer.encode_special_tokens = not allow_special
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return DecodeStream(self)

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` and the `tokenizer_config.json` that transformers reads beside it."""
        names = {"bos_token": self._bos, "eos_token": self._eos}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
            k: v for k, v in names.items() if v
        }
        return {"tokenizer.json": self._json.encode(), "tokenizer_config.json": _json(config)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files."""
        return fingerprint(self.files())

    def __reduce__(self) -> tuple:
        return FileTokenizer, (self._json, self._bos, self._eos)


def load_tokenizer(
    source: str | os.PathLike | Mapping[str, bytes], bos: str = "", eos: str = ""
) -> Tokenizer:
    """The tokenizer of a folder, of a `tokenizer.json`, or of the files that `files()` gave.

    Raises:
        FileNotFoundError: there is no tokenizer at the path.
        ValueError: the file is not a tokenizer.
    """
    if isinstance(source, Mapping):
        return _from_files(source, "tokenizer files", bos, eos)
    path = Path(source).expanduser()
    names = ("tokenizer.json", "tokenizer_config.json", OWN_FILE)
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    elif path.is_file():
        beside = path.parent / "tokenizer_config.json"
        files = {"tokenizer.json": path.read_bytes()}
        files |= {beside.name: beside.read_bytes()} if beside.is_file() else {}
    else:
        raise FileNotFoundError(f"tokenizer {str(path)!r}: no such file or folder")
    return _from_files(files, str(path), bos, eos)


def _from_files(files: Mapping[str, bytes], where: str, bos: str, eos: str) -> Tokenizer:
    if "tokenizer.json" in files:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        bos, eos = bos or _token_text(config, "bos_token"), eos or _token_text(config, "eos_token")
        try:
            return FileTokenizer(files["tokenizer.json"].decode(), bos, eos)
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"{where}: not a usable tokenizer.json: {error}") from error
    if OWN_FILE in files:
        stored = json.loads(files[OWN_FILE])
        if stored["kind"] == "bytes":
            return ByteTokenizer()
        return CharacterTokenizer(stored["characters"])
    held = ", ".join(files) or "neither"
    raise ValueError(f"{where}: needs tokenizer.json or {OWN_FILE}, holds {held}")


def fingerprint(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\x1f{len(files[name])}\x1f".encode() + files[name])
    return digest.hexdigest()


def _token_text(config: Mapping[str, object], key: str) -> str:
    value = config.get(key)
    return str(value.get("content", "")) if isinstance(value, Mapping) else str(value or "")


def _encode_with_special(tokenizer: ByteTokenizer, text: str) -> Ids:
    pieces, rest = [], text
    while rest:
        found = [(rest.find(name), name) for name in tokenizer.special_tokens if name in rest]
        at, name = min(found, default=(len(rest), ""))
        pieces.append(np.frombuffer(rest[:at].encode(), np.uint8).astype(np.int32))
        pieces += [np.array([tokenizer.special_tokens[name]], np.int32)] if name else []
        rest = rest[at + len(name) :]
    return np.concatenate(pieces or [np.zeros(0, np.int32)])


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
