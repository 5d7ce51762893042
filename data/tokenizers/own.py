"""Tokenizers that need no library and no training: bytes, and characters."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data.tokenizers.protocol import OWN_FILE, Backend, DecodeStream, Ids, Spans, to_json

BOS, EOS = "<|bos|>", "<|eos|>"


class ByteTokenizer(Backend):
    """UTF-8 bytes as ids 0 to 255, then `<|bos|>` 256 and `<|eos|>` 257; needs no training."""

    vocab_size = 258
    bos = 256
    eos = 257

    def __init__(self) -> None:
        self.special_tokens = {BOS: 256, EOS: 257}

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text."""
        if allow_special:
            return [self.encode_with_spans(text, allow_special)[0] for text in texts]
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_with_spans(
        self, text: str, allow_special: bool = False, continued: bool = False
    ) -> tuple[Ids, Spans]:
        """Ids of one text and the characters that each stands for."""
        parts = list(self._parts(text)) if allow_special else [(0, text, None)]
        ids, spans = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int64)]
        for start, part, special in parts:
            if special is not None:
                ids.append(np.array([special], np.int32))
                spans.append(np.array([[start, start + len(part)]]))
                continue
            sizes = [len(character.encode()) for character in part]
            of = start + np.repeat(np.arange(len(part)), sizes)
            ids.append(np.frombuffer(part.encode(), np.uint8).astype(np.int32))
            spans.append(np.stack([of, of + 1], axis=1))
        return np.concatenate(ids), np.concatenate(spans)

    def _parts(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """`(start, text, id of the special token or None)`."""
        at = 0
        for match in re.finditer("|".join(map(re.escape, self.special_tokens)), text):
            yield at, text[at : match.start()], None
            yield match.start(), match[0], self.special_tokens[match[0]]
            at = match.end()
        yield at, text[at:], None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", errors="replace")

    def _bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"id {token} is none of the byte tokenizer's 0..{self.vocab_size - 1}")
        return bytes((int(token),)) if token < 256 else (BOS, EOS)[token - 256].encode()

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return _ByteStream(self)

    def id_bytes(self) -> list[bytes]:
        """The byte of each id; none for the special two."""
        return [bytes((byte,)) for byte in range(256)] + [b"", b""]

    def files(self) -> dict[str, bytes]:
        """One small file that names the kind."""
        return {OWN_FILE: to_json({"kind": "bytes"})}


class _ByteStream(DecodeStream):
    """Exact for bytes, also for invalid ones: the standard incremental UTF-8 decoder."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        super().__init__(tokenizer)
        self._bytes = tokenizer._bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class CharacterTokenizer(Backend):
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

    def encode_with_spans(
        self, text: str, allow_special: bool = False, continued: bool = False
    ) -> tuple[Ids, Spans]:
        """Ids of one text and the characters that each stands for."""
        of = np.arange(len(text))
        return self._encode_one(text), np.stack([of, of + 1], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return "".join(chr(self._codes[int(i)]) for i in ids)

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return DecodeStream(self)

    def id_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each character."""
        return [chr(code).encode() for code in self._codes]

    def files(self) -> dict[str, bytes]:
        """One small file with the characters."""
        characters = "".join(chr(code) for code in self._codes)
        return {OWN_FILE: to_json({"kind": "characters", "characters": characters})}
