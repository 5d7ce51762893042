"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.tokenizers import Tokenizer
from data.tokenizers.protocol import REPLACEMENT
from serving.outputs import TokenLogprob

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass
class TokenTexts:
    """The text of single tokens, as they stand within a text: with their space in front."""

    tokenizer: Tokenizer
    _known: dict[int, str] = field(default_factory=dict)
    _before: list[int] | None = None

    def __call__(self, token: int) -> str:
        """The text of an id, U+FFFD for part of a character."""
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]

    def bytes_of(self, token: int) -> list[int] | None:
        """The bytes of an id; None for special tokens and parts of characters."""
        text = self(token)
        whole = REPLACEMENT not in text and text not in self.tokenizer.special_tokens
        return list(text.encode()) if whole else None

    def _decode(self, token: int) -> str:
        if self._before is None:
            self._before = self._context()
        before = self.tokenizer.decode(self._before)
        return self.tokenizer.decode([*self._before, token])[len(before) :]

    def _context(self) -> list[int]:
        """A token that ends a word, so that the next one's space is its own."""
        for text in ("a", "e", "0"):
            try:
                return [int(i) for i in self.tokenizer.encode([text])[0]]
            except ValueError:
                continue
        return []


@dataclass
class CompletionLogprobs:
    """`logprobs` of completions, where offsets go on from one part of an answer to the next.

    top: how many likeliest tokens the request asked for. as_ids: name tokens `token_id:7`.
    """

    texts: TokenTexts
    top: int
    as_ids: bool = False
    _offset: int = 0

    def __call__(
        self, entries: Sequence[TokenLogprob], first: int | None = None
    ) -> dict[str, list[Any]]:
        """The object for the next entries; before them `first`, a token that has none."""
        shown: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        if first is not None:
            self._show(shown, first, None, None)
        for entry in entries:
            self._show(shown, entry.token, finite(entry.logprob), self._likeliest(entry))
        return shown

    def _show(
        self,
        shown: dict[str, list[Any]],
        token: int,
        logprob: float | None,
        likeliest: dict[str, float] | None,
    ) -> None:
        shown["text_offset"].append(self._offset)
        shown["tokens"].append(self._name(token))
        shown["token_logprobs"].append(logprob)
        shown["top_logprobs"].append(likeliest)
        self._offset += len(self.texts(token))

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.texts(token)

    def _likeliest(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest, and the token itself; of two with one text the likelier."""
        shown: dict[str, float] = {}
        for token, value in (*entry.top[: self.top], (entry.token, entry.logprob)):
            shown.setdefault(self._name(token), finite(value))
        return shown


def chat_logprobs(
    entries: Sequence[TokenLogprob], texts: TokenTexts, top: int
) -> dict[str, list[dict[str, Any]]]:
    """`logprobs` of chats."""

    def shown(token: int, value: float) -> dict[str, Any]:
        return {"token": texts(token), "logprob": finite(value), "bytes": texts.bytes_of(token)}

    return {
        "content": [
            {
                **shown(entry.token, entry.logprob),
                "top_logprobs": [shown(*likely) for likely in entry.top[:top]],
            }
            for entry in entries
        ]
    }


def finite(value: float) -> float:
    """A log-probability that JSON can hold."""
    return float(value) if value > LEAST else LEAST
