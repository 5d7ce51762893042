"""What every tokenizer gives (`Tokenizer`), and what the backends share (`Backend`)."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

Ids = np.ndarray
Spans = np.ndarray
REPLACEMENT = "\ufffd"
OWN_FILE = "sheaf_tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What every backend gives; ids are int32, a special token is None where there is none."""

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
    def pad(self) -> int | None:
        """The token that the tokenizer's files name for padding."""
        ...

    @property
    def unk(self) -> int | None:
        """The token of text that has no other."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        ...

    @property
    def prompt_prefix(self) -> tuple[int, ...]:
        """Ids that the model expects before a plain prompt, as the files say."""
        ...

    @property
    def prompt_suffix(self) -> tuple[int, ...]:
        """Ids that the model expects after a plain prompt, as the files say."""
        ...

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text; special tokens written in a text are ordinary text unless allowed."""
        ...

    def encode_prompt(self, text: str, allow_special: bool = False) -> Ids:
        """Ids of one text with `prompt_prefix` and `prompt_suffix`, as transformers encodes it."""
        ...

    def encode_with_spans(
        self, text: str, allow_special: bool = False, continued: bool = False
    ) -> tuple[Ids, Spans]:
        """Ids of one text and the characters `int64[n, 2]` that each stands for, `[start, stop)`.

        A `continued` text follows other text, so it gets no space of its own in front.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out; invalid UTF-8 becomes U+FFFD."""
        ...

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time; its pieces joined are `decode` of all ids."""
        ...

    def id_bytes(self) -> list[bytes] | None:
        """The UTF-8 bytes, whole characters or not, that each id adds within a text; none for
        special tokens and ids without a token. None if text is not made of its ids' bytes.
        """
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


class Backend(abc.ABC):
    """What the backends share: prompts, and a fingerprint over `files()`."""

    pad: int | None = None
    unk: int | None = None
    prompt_prefix: tuple[int, ...] = ()
    prompt_suffix: tuple[int, ...] = ()

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text; special tokens written in a text are ordinary text unless allowed."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that make this tokenizer again, by name."""

    def encode_prompt(self, text: str, allow_special: bool = False) -> Ids:
        """Ids of one text with `prompt_prefix` and `prompt_suffix`, as transformers encodes it."""
        ids = self.encode([text], allow_special)[0]
        return np.concatenate([self.prompt_prefix, ids, self.prompt_suffix]).astype(np.int32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files."""
        return fingerprint(self.files())


def fingerprint(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\x1f{len(files[name])}\x1f".encode() + files[name])
    return digest.hexdigest()


def to_json(value: object) -> bytes:
    """A JSON file's bytes; the same value gives the same bytes."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
