"""From ids to text by a table of each id's bytes, whole or as a stream, with the same result.

For byte-level vocabularies (GPT-2, Llama 3) and for those of SentencePiece (Llama 2, Gemma), where
a space is written `▁`, unknown characters are bytes `<0x…>`, and the space before a text's first
word falls away.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from data.tokenizers.protocol import REPLACEMENT, DecodeStream

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ESCAPED = re.compile("[\udc80-\udcff]")


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2).

    Visible Latin-1 characters stand for themselves, the other bytes are U+0100 and up, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_piece(token: str, alphabet: Mapping[str, int]) -> bytes:
    """Bytes of a token of a byte-level vocabulary; one with other characters is plain text."""
    codes = [alphabet.get(character) for character in token]
    return token.encode() if None in codes else bytes(code for code in codes if code is not None)


def sentencepiece_piece(token: str) -> bytes:
    """Bytes of a SentencePiece token: a byte, or text with spaces in place of `▁`."""
    byte = BYTE.fullmatch(token)
    return bytes((int(byte[1], 16),)) if byte else token.replace(SPACE, " ").encode()


@dataclass(frozen=True)
class Pieces:
    """What ids are as text.

    table: bytes of each id; an id without a token is no text.
    opening: other bytes of some ids, where they begin a text (without their space in front).
    until_shown: a text has not begun while nothing is shown (SentencePiece without extra spaces);
        else it has after its first id.
    each_byte: invalid UTF-8 is one U+FFFD a byte (SentencePiece), else one a cut-off character.
    """

    table: Mapping[int, bytes]
    opening: Mapping[int, bytes]
    until_shown: bool = False
    each_byte: bool = False

    @staticmethod
    def byte_level(tokens: Mapping[int, str], special: Mapping[int, str]) -> Pieces:
        """Of a byte-level vocabulary; `special` tokens are plain text."""
        alphabet = byte_alphabet()
        table = {i: byte_level_piece(token, alphabet) for i, token in tokens.items()}
        return Pieces(table | {i: text.encode() for i, text in special.items()}, {})

    @staticmethod
    def sentencepiece(
        tokens: Mapping[int, str],
        special: Mapping[int, str],
        strips: bool,
        until_shown: bool = False,
    ) -> Pieces:
        """Of a SentencePiece vocabulary with `special` tokens, which are plain text; `strips` drops
        the space before the first word.
        """
        table = {i: sentencepiece_piece(token) for i, token in tokens.items() if i not in special}
        spaced = [i for i in table if tokens[i].startswith(SPACE)] if strips else []
        opening = {i: table[i][1:] for i in spaced}
        table |= {i: text.encode() for i, text in special.items()}
        return Pieces(table, opening, until_shown, each_byte=True)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        stream = PieceStream(self)
        return stream.push_all(ids) + stream.flush()

    def id_bytes(self, vocab_size: int, special: Collection[int]) -> list[bytes]:
        """Bytes of each id within a text; none for `special` ones."""
        table = self.table
        return [b"" if i in special else table.get(i, b"") for i in range(vocab_size)]


class PieceStream(DecodeStream):
    """Text as soon as it is certain; the pieces joined are the text of all ids, to the letter."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._begun = pieces, False
        errors = "surrogateescape" if pieces.each_byte else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is incomplete."""
        return self.push_all((token,))

    def push_all(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete."""
        tokens = [int(token) for token in ids]
        if tokens and min(tokens) < 0:
            raise ValueError(f"id {min(tokens)} is no token; padding and ignored targets must go")
        pieces: list[bytes] = []
        while not self._begun and len(pieces) < len(tokens):
            pieces.append(self._first(tokens[len(pieces)]))
        table = self._pieces.table
        pieces += [table.get(token, b"") for token in tokens[len(pieces) :]]
        return self._text(b"".join(pieces))

    def _first(self, token: int) -> bytes:
        """Bytes of an id that may begin the text."""
        piece = self._pieces.table.get(token, b"")
        piece = self._pieces.opening.get(token, piece)
        self._begun = bool(piece) or not self._pieces.until_shown
        return piece

    def _text(self, data: bytes, final: bool = False) -> str:
        return _ESCAPED.sub(REPLACEMENT, self._decoder.decode(data, final))

    def flush(self) -> str:
        """Whatever is still held back, as U+FFFD."""
        return self._text(b"", final=True)
