"""Ids to text as they come: whole characters, nothing of a stop string, the same text as at once.

A stream of ids is decoded by the tokenizer's own `decode_stream`, which holds back characters that
are not complete. On top of it `TextOut` ends the text at stop strings, which may lie across tokens,
and holds back only what may still become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.request import Request, State
from serving.sampling_params import SamplingParams

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer

CONTEXT_TOKENS = 8
"""Tokens of the prompt before the answer: enough for a character's bytes and a word's space."""


@dataclass(frozen=True)
class Piece:
    """Text that became certain; stop: the stop string that ended the answer."""

    text: str = ""
    stop: str | None = None


class TextOut:
    """The text of one answer, token by token.

    The answer continues `prompt`, so the space before its first word is kept, and a character that
    begins in the prompt's last tokens is completed.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int] = ()
    ) -> None:
        self._params = params
        self._stream = tokenizer.decode_stream()
        self._special = frozenset(tokenizer.special_tokens.values())
        self._held = ""
        self._num_tokens = 0
        self._ended = False
        for token in prompt[-CONTEXT_TOKENS:]:
            self._decode(int(token))

    @property
    def num_tokens(self) -> int:
        """Tokens up to the end, the one that completed a stop string among them: what `usage`
        counts.
        """
        return self._num_tokens

    def push(self, token: int) -> Piece:
        """Take the next id; after the end it is dropped."""
        if self._ended:
            return Piece()
        self._num_tokens += 1
        return self._search(self._decode(int(token)))

    def end(self, stop_token: int | None = None) -> Piece:
        """Give the rest, an incomplete character as U+FFFD.

        stop_token: the id that ended the answer, instead of a last `push`. Its text is left out,
        unless it is special and the request asks for special tokens.
        """
        if self._ended:
            return Piece()
        new = ""
        if stop_token is not None:
            self._num_tokens += 1
            if stop_token in self._special:
                new = self._decode(stop_token)
        piece = self._search(new + self._stream.flush())
        self._ended = True
        held, self._held = self._held, ""
        return Piece(piece.text + held, piece.stop)

    def take(self, request: Request) -> Piece:
        """The text of what a request has generated since the last call, and its rest at the end.

        A stop string in it is for the caller to report: `Scheduler.finish` with
        `FINISHED_STOP` and `stop`.
        """
        new, ends = request.output[self._num_tokens :], request.state.finished
        by_token = ends and request.state is State.FINISHED_STOP and request.stops_at(new[-1:])
        pieces = [self.push(token) for token in (new[:-1] if by_token else new)]
        if ends:
            pieces.append(self.end(new[-1] if by_token else None))
        if len(pieces) == 1:
            return pieces[0]
        stop = next((piece.stop for piece in pieces if piece.stop is not None), None)
        return Piece("".join(piece.text for piece in pieces), stop)

    def _decode(self, token: int) -> str:
        skipped = self._params.skip_special_tokens and token in self._special
        return "" if skipped else self._stream.push(token)

    def _search(self, new: str) -> Piece:
        """End at the stop string whose first match in the text with `new` ends first."""
        if not self._params.stop:
            return Piece(new)
        text, old = self._held + new, len(self._held)
        counts = self._num_tokens >= self._params.min_tokens
        found = _first(text, old, self._params.stop) if new and counts else None
        if found is None:
            self._held = _held_back(text, self._params.stop)
            return Piece(text[: len(text) - len(self._held)])
        start, stop = found
        self._held, self._ended = "", True
        kept = start + (len(stop) if self._params.include_stop_str_in_output else 0)
        return Piece(text[:kept], stop)


def _first(text: str, old: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where a stop string begins that ends after the first `old` characters, and which it is: the
    one that ends first, then the one that begins first.
    """
    matches = []
    for stop in stops:
        start = text.find(stop, max(old - len(stop) + 1, 0))
        if start >= 0:
            matches.append((start + len(stop), start, stop))
    return min(matches)[1:] if matches else None


def _held_back(text: str, stops: Sequence[str]) -> str:
    """The longest end of `text` with which a stop string begins."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(stop) > length and stop.startswith(end) for stop in stops):
            return end
    return ""
