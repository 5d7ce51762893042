"""Hugging Face `tokenizer.json`, loaded or trained, and GPT-2's `vocab.json` with `merges.txt`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken as RustAddedToken
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from data.tokenizers.own import BOS, EOS
from data.tokenizers.pieces import SPACE, Pieces, PieceStream
from data.tokenizers.protocol import Backend, DecodeStream, Ids, Spans, to_json
from data.tokenizers.settings import (
    CONFIG,
    AddedToken,
    TokenSettings,
    read_json,
    read_settings,
    read_text,
    with_roles,
)

JSON_FILE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
GPT2_SPECIAL = "<|endoftext|>"
_USUAL_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", GPT2_SPECIAL)
_USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", GPT2_SPECIAL, "<|im_end|>")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class FileTokenizer(Backend):
    """A `tokenizer.json`, with what the files beside it say; `bos` and `eos` are given or found.

    Where no file names them, `bos` and `eos` are the usual special tokens that it holds.
    """

    def __init__(
        self,
        tokenizer_json: str,
        bos: str = "",
        eos: str = "",
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self._json = tokenizer_json
        self._given = bos, eos
        self._tokenizer = _parsed(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = read_settings(files or {})
        _add_tokens(self._tokenizer, settings)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in sorted(added.items()) if t.special}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        bos, self.bos = self._find(bos, "bos_token", settings, _USUAL_BOS)
        eos, self.eos = self._find(eos, "eos_token", settings, _USUAL_EOS)
        self.pad = self._tokenizer.token_to_id(settings.roles.get("pad_token") or "")
        unk = settings.roles.get("unk_token") or getattr(self._tokenizer.model, "unk_token", None)
        self.unk = self._tokenizer.token_to_id(unk or "")
        self.prompt_prefix, self.prompt_suffix = self._around(settings)
        self._files = self._kept_files(files, bos, eos)

    def _find(
        self, given: str, role: str, settings: TokenSettings, usual: tuple[str, ...]
    ) -> tuple[str, int | None]:
        named = given or settings.roles.get(role)
        if named and self._tokenizer.token_to_id(named) is None:
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(
                f"token {named!r} is not in the tokenizer; its special tokens: {known}"
            )
        if not named and role not in settings.roles:
            named = next((name for name in usual if name in self.special_tokens), "")
        return named or "", self._tokenizer.token_to_id(named) if named else None

    def _around(self, settings: TokenSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a prompt begins and ends with: the config's word, else the file's post-processor."""
        if settings.add_bos is not None or settings.add_eos is not None:
            begin = settings.add_bos and self.bos is not None
            end = settings.add_eos and self.eos is not None
            return (self.bos,) if begin else (), (self.eos,) if end else ()  # type: ignore[return-value]
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        starts = range(len(whole) - len(plain) + 1)
        start = next(i for i in starts if whole[i : i + len(plain)] == plain)
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])

    def _kept_files(
        self, files: Mapping[str, bytes] | None, bos: str, eos: str
    ) -> dict[str, bytes]:
        if files is not None:
            given_bos, given_eos = self._given
            return with_roles(files, {"bos_token": given_bos, "eos_token": given_eos})
        names = {"bos_token": bos, "eos_token": eos}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
            role: name for role, name in names.items() if name
        }
        return {JSON_FILE: self._json.encode(), CONFIG: to_json(config)}

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

    def encode_with_spans(
        self, text: str, allow_special: bool = False, continued: bool = False
    ) -> tuple[Ids, Spans]:
        """Ids of one text and the characters that each stands for."""
        # After a line break nothing is put in front of a text that goes on.
        before = "\n" if continued and self._puts_a_space_in_front else ""
        self._tokenizer.encode_special_tokens = not allow_special
        encoding = self._tokenizer.encode(before + text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) - len(before)
        if before and ((spans[:, 0] < 0) & (spans[:, 1] > 0)).any():
            return self.encode_with_spans(text, allow_special)
        kept = spans[:, 1] > 0 if before else slice(None)
        return ids[kept], np.maximum(spans[kept], 0)

    @functools.cached_property
    def _puts_a_space_in_front(self) -> bool:
        alone, after = self.encode(["a", "\na"])
        return len(alone) > 0 and after[-len(alone) :].tolist() != alone.tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out; an id without a token is no text."""
        if self._pieces is not None:
            return self._pieces.decode(ids)
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self) -> DecodeStream:
        """A decoder that is fed one id at a time."""
        return DecodeStream(self) if self._pieces is None else PieceStream(self._pieces)

    def id_bytes(self) -> list[bytes] | None:
        """Bytes of each id within a text; None for decoders that do more than join them."""
        if self._pieces is None:
            return None
        return self._pieces.id_bytes(self.vocab_size, {*self.special_tokens.values()})

    @functools.cached_property
    def _pieces(self) -> Pieces | None:
        """What each id is as text, for the decoders whose text is that of the ids joined."""
        described = json.loads(self._json).get("decoder") or {}
        steps = described.get("decoders", [described])
        kinds = [step.get("type") for step in steps]
        special = {number: text for text, number in self.special_tokens.items()}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True).items()
        tokens = {number: token for token, number in vocab}
        if kinds == ["ByteLevel"]:
            return Pieces.byte_level(tokens, special)
        if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or _replaced(steps[0]) != (SPACE, " "):
            return None
        if kinds[3:] == ["Strip"] and (steps[3]["content"], steps[3]["stop"]) == (" ", 0):
            return Pieces.sentencepiece(tokens, special, strips=steps[3]["start"] == 1)
        return None if kinds[3:] else Pieces.sentencepiece(tokens, special, strips=False)

    def files(self) -> dict[str, bytes]:
        """The files it was made from, unchanged; a trained one has `tokenizer.json` and the
        `tokenizer_config.json` that transformers reads beside it.
        """
        return dict(self._files)

    def __reduce__(self) -> tuple:
        return FileTokenizer, (self._json, *self._given, self._files)


def _parsed(tokenizer_json: str) -> RustTokenizer:
    try:
        return RustTokenizer.from_str(tokenizer_json)
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"not a usable {JSON_FILE}: {error}") from error


def _add_tokens(tokenizer: RustTokenizer, settings: TokenSettings) -> None:
    """Add what the config lists and `tokenizer.json` lacks, with the ids of the config, and make
    special what it calls so.
    """
    there = set(tokenizer.get_added_tokens_decoder())
    for token in settings.added:
        known = tokenizer.token_to_id(token.content) in (None, token.id)
        if known and token.id not in there:
            tokenizer.add_tokens([_rust_token(token)])
        if (found := tokenizer.token_to_id(token.content)) != token.id:
            raise ValueError(
                f"{CONFIG}: added token {token.content!r} has id {token.id}, but the vocabulary "
                f"gives it {found}"
            )
    by_text = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    for text in sorted(settings.special):
        old = by_text.get(text)
        if tokenizer.token_to_id(text) is not None and not (old and old.special):
            sides = {"lstrip": old.lstrip, "rstrip": old.rstrip} if old else {}
            made = RustAddedToken(text, special=True, normalized=False, **sides)
            tokenizer.add_special_tokens([made])


def _rust_token(token: AddedToken) -> RustAddedToken:
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    return RustAddedToken(token.content, **{flag: getattr(token, flag) for flag in flags})


def _replaced(step: Mapping[str, Any]) -> tuple[str | None, str]:
    return step["pattern"].get("String"), step["content"]


def from_vocab_and_merges(
    files: Mapping[str, bytes], bos: str = "", eos: str = ""
) -> FileTokenizer:
    """GPT-2's `vocab.json` and `merges.txt`, with the split of the class that the config names.

    Raises `ValueError` for a class whose split is not known, or files that are not as they must be.
    """
    settings = read_settings(files)
    vocab, merges = read_json(files, VOCAB), _merges(read_text(files, MERGES))
    try:
        tokenizer: Any = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{VOCAB} and {MERGES} do not fit: {error}") from error
    tokenizer.decoder = decoders.ByteLevel()
    space = bool(settings.config.get("add_prefix_space") or False)
    match settings.tokenizer_class:
        case "" | "GPT2Tokenizer" | "CodeGenTokenizer":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        case "Qwen2Tokenizer":
            tokenizer.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
            to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        case other:
            raise ValueError(
                f"{CONFIG}: how {other} splits text into words is in no file; give its {JSON_FILE} "
                "(transformers writes one)"
            )
    if GPT2_SPECIAL in vocab:
        tokenizer.add_special_tokens([GPT2_SPECIAL])
    return FileTokenizer(tokenizer.to_str(), bos, eos, files)


def _merges(content: str) -> list[tuple[str, str]]:
    """Pairs in order of merging; the first line may be a comment with the version."""
    pairs = []
    for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{MERGES}: line {number} is {line!r}; it must be two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs
