"""SentencePiece's `tokenizer.model` (Llama 1 and 2, Mistral, Gemma, MiniCPM, InternLM2, Baichuan).

Text is cut at the added tokens, which transformers keeps in files beside the model, and what lies
between goes through the sentencepiece library. A `Part` of a text is either.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.tokenizers.pieces import SPACE, Pieces, PieceStream
from data.tokenizers.protocol import Backend, DecodeStream, Ids, Spans
from data.tokenizers.settings import CONFIG, AddedToken, TokenSettings, read_settings, with_roles

MODEL_FILE = "tokenizer.model"
# Protocol buffers merge repeated fields: normalizer_spec (3) with add_dummy_prefix (3) = false.
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Part:
    """A piece of text at `start`: an added token with its `id`, or words for the model.

    opens: the words get SentencePiece's space in front of them.
    """

    text: str
    start: int
    id: int | None = None
    opens: bool = False


class SentencePieceTokenizer(Backend):
    """A folder's `tokenizer.model` with the settings beside it.

    A text's first words get a space in front if the model was trained so, and with `legacy` (the
    default of older folders) so do words after an added token. Where no file says otherwise, a
    prompt gets `bos`, as transformers' classes for these models do.
    """

    def __init__(self, files: Mapping[str, bytes], bos: str = "", eos: str = "") -> None:
        self._files = with_roles(files, {"bos_token": bos, "eos_token": eos})
        settings = read_settings(self._files)
        spaces = settings.config.get("add_prefix_space") is not False
        model = files[MODEL_FILE]
        continuing = _processor(model + _WITHOUT_PREFIX)
        self._model = _processor(model) if spaces else continuing
        _check(settings, self._model)
        self._processors = {True: self._model, False: continuing}
        self._legacy = settings.config.get("legacy") is not False
        self._tokens = {i: self._model.id_to_piece(i) for i in range(len(self._model))}
        self._added = _added_tokens(self._model, self._tokens, settings)
        self._patterns = {allow: _pattern(self._added, allow) for allow in (True, False)}
        self._readable = {
            allow: _readable(self._model, self._tokens, self._added, allow)
            for allow in (True, False)
        }
        self.special_tokens = {t.content: t.id for t in self._added if t.special}
        self.vocab_size = max([len(self._tokens), *(t.id + 1 for t in self._added)])
        self.bos, self.eos = self._role(settings, "bos"), self._role(settings, "eos")
        self.pad, self.unk = self._role(settings, "pad"), self._role(settings, "unk")
        self.prompt_prefix = _ids(self.bos, settings.add_bos is not False)
        self.prompt_suffix = _ids(self.eos, settings.add_eos is True)

    def _role(self, settings: TokenSettings, role: str) -> int | None:
        """Id of the token in a role: that of the files, or else of the model."""
        if f"{role}_token" not in settings.roles:
            found = getattr(self._model, f"{role}_id")()
            return found if found >= 0 else None
        name = settings.roles[f"{role}_token"]
        if role in ("bos", "eos") and name and name not in self.special_tokens:
            known = ", ".join(self.special_tokens)
            raise ValueError(f"token {name!r} is not in the tokenizer; its special tokens: {known}")
        return self.special_tokens.get(name or "")

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[Ids]:
        """Ids of each text, in parallel over texts."""
        rows = [list(self._parts(text, allow_special)) for text in texts]
        words = [part for row in rows for part in row if part.id is None]
        made = {
            opens: iter(processor.encode([p.text for p in words if p.opens == opens], out_type=int))
            for opens, processor in self._processors.items()
        }
        ids = [[next(made[p.opens]) if p.id is None else [p.id] for p in row] for row in rows]
        return [np.fromiter(itertools.chain.from_iterable(row), np.int32) for row in ids]

    def encode_with_spans(
        self, text: str, allow_special: bool = False, continued: bool = False
    ) -> tuple[Ids, Spans]:
        """Ids of one text and the characters that each stands for."""
        ids, spans = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int64)]
        for part in self._parts(text, allow_special, continued):
            if part.id is None:
                processor = self._processors[part.opens]
                ids.append(np.array(processor.encode(part.text, out_type=int), np.int32))
                spans.append(part.start + _spans(processor, part.text, ids[-1]))
            else:
                ids.append(np.array([part.id], np.int32))
                spans.append(part.start + np.array([[0, len(part.text)]]))
        return np.concatenate(ids), np.concatenate(spans)

    def _parts(self, text: str, allow_special: bool, continued: bool = False) -> Iterator[Part]:
        at, opens = 0, not continued
        pattern, tokens = self._patterns[allow_special]
        for match in pattern.finditer(text):
            yield from self._words(text[at : match.start()], at, opens, allow_special)
            yield Part(match[0], match.start(), tokens[(match.lastindex or 1) - 1].id)
            at, opens = match.end(), self._legacy
        yield from self._words(text[at:], at, opens, allow_special)

    def _words(self, text: str, start: int, opens: bool, allow_special: bool) -> Iterator[Part]:
        """Text for the model, cut inside whatever the model would read as a special token."""
        cuts = [match.start() + 1 for match in self._readable[allow_special].finditer(text)]
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if end > begin:
                yield Part(text[begin:end], start + begin, opens=opens and begin == 0)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out; an id without a token is no text."""
        return self._pieces.decode(ids)

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return PieceStream(self._pieces)

    def id_bytes(self) -> list[bytes]:
        """Bytes of each id within a text."""
        return self._pieces.id_bytes(self.vocab_size, {*self.special_tokens.values()})

    @functools.cached_property
    def _pieces(self) -> Pieces:
        normalize = self._model.normalize
        prefix, squeezes = normalize("a") != "a", normalize("a  a") == normalize("a a")
        plain = {token.id: token.content for token in self._added}
        return Pieces.sentencepiece(self._tokens, plain, prefix or squeezes, until_shown=squeezes)

    def files(self) -> dict[str, bytes]:
        """The files it was made from, unchanged."""
        return dict(self._files)

    def __reduce__(self) -> tuple:
        return SentencePieceTokenizer, (self._files,)


def _added_tokens(
    model: Any, tokens: Mapping[int, str], settings: TokenSettings
) -> list[AddedToken]:
    """All tokens that text is cut at: the model's control tokens and what the files add or call
    special. A token that the model finds by itself stays the model's.
    """
    ids = {text: number for number, text in tokens.items()}
    control = [i for i in tokens if model.is_control(i) or model.is_unknown(i)]
    named = control + [ids[text] for text in settings.special if text in ids]
    found = {i: AddedToken(i, tokens[i], special=True) for i in sorted(named)}
    for token in settings.added:
        if ids.get(token.content, token.id) != token.id:
            raise ValueError(
                f"{CONFIG}: added token {token.content!r} has id {token.id}, but {MODEL_FILE} "
                f"gives it {ids[token.content]}"
            )
        if token.special or tokens.get(token.id) != token.content:
            found[token.id] = token
    return list(found.values())


def _pattern(
    added: Iterable[AddedToken], allow_special: bool
) -> tuple[re.Pattern[str], list[AddedToken]]:
    """Finds added tokens, the longest first, special ones only where they are allowed; and the
    token of each group.
    """
    wanted = [token for token in added if allow_special or not token.special]
    wanted.sort(key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(map(_matching, wanted)) or "(?!)"), wanted


def _matching(token: AddedToken) -> str:
    middle = f"({re.escape(token.content)})"
    middle = rf"(?<!\w){middle}(?!\w)" if token.single_word else middle
    return (r"\s*" if token.lstrip else "") + middle + (r"\s*" if token.rstrip else "")


def _readable(
    model: Any, tokens: Mapping[int, str], added: Iterable[AddedToken], allow_special: bool
) -> re.Pattern[str]:
    """Finds text that the model itself would read as a special token: the token where it is not
    allowed, and always the piece that the token has replaced.
    """
    special = [t for t in added if t.special and t.id in tokens and _is_text(model, t.id)]
    pieces = [tokens[t.id] for t in special if not allow_special or tokens[t.id] != t.content]
    names = [piece.lstrip(SPACE).replace(SPACE, " ") for piece in pieces]
    return re.compile("|".join(f"(?={re.escape(n)})" for n in names if len(n) > 1) or "(?!)")


def _is_text(model: Any, number: int) -> bool:
    kinds = (model.is_control, model.is_unknown, model.is_byte, model.is_unused)
    return not any(kind(number) for kind in kinds)


def _spans(model: Any, text: str, ids: Ids) -> Spans:
    """Characters of `text` that each id stands for; those of one character's bytes share it."""
    normalized, starts = model.normalize(text, with_offsets=True)
    pieces = model.encode(text, out_type=str)
    pairs = zip(ids.tolist(), pieces, strict=True)
    sizes = np.array([1 if model.is_byte(i) else len(p.encode()) for i, p in pairs], np.int64)
    ends = np.cumsum(sizes)
    character = np.repeat(np.arange(len(normalized)), [len(c.encode()) for c in normalized])
    offsets = np.array([*starts, len(text)], np.int64)
    begin, last = offsets[character[ends - sizes]], offsets[character[ends - 1]]
    stop = offsets[np.searchsorted(offsets, last, side="right")]
    return np.stack([begin, stop], axis=1)


def _processor(model: bytes) -> Any:
    try:
        library = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ImportError(
            f"{MODEL_FILE} is read with the sentencepiece library: pip install 'sheaf[hub]'"
        ) from error
    try:
        return library.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(
            f"{MODEL_FILE}: not a SentencePiece model ({error}); if it holds tiktoken's ranks, "
            "give the model's tokenizer.json"
        ) from error


def _check(settings: TokenSettings, model: Any) -> None:
    if model.normalize("a") == f"a{SPACE}":
        raise ValueError(f"{MODEL_FILE}: its spaces stand after words, which is not read here")
    if options := settings.config.get("sp_model_kwargs"):
        raise ValueError(
            f"{CONFIG}: sp_model_kwargs is {options!r}; encoding is deterministic here, so it must "
            "be empty"
        )


def _ids(token: int | None, wanted: bool) -> tuple[int, ...]:
    return (token,) if wanted and token is not None else ()
