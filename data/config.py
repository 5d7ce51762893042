"""What a run reads, as frozen dataclasses: sources, tokenizer, windows, mixture, validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from weights import nearest

PACKINGS = ("concat_split", "best_fit", "first_fit", "pad")


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids.

    kind: bytes, characters (vocabulary from the text), bpe (trained on the text) or file.
    path: for kind=file, a model's folder, or its tokenizer.json or tokenizer.model.
    vocab_size: for kind=bpe, entries to train, special tokens included.
    train_bytes: for kind=bpe, how much text it is trained on, spread over the files.
    bos: text of the token put before each document; empty finds the tokenizer's own.
    eos: text of the token put after each document; empty finds the tokenizer's own.
    """

    kind: str = "bpe"
    path: str = ""
    vocab_size: int = 4096
    train_bytes: int = 4_000_000
    bos: str = ""
    eos: str = ""

    def __post_init__(self) -> None:
        _choose("tokenizer.kind", self.kind, ("bytes", "characters", "bpe", "file"))
        if self.kind == "file" and not self.path:
            raise ValueError(
                "tokenizer.path is empty: kind=file needs a tokenizer.json or its folder"
            )
        if self.kind == "bpe" and self.vocab_size < 260:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size}: a byte-level BPE needs 256 bytes and its "
                "special tokens, so at least 260"
            )
        _positive("tokenizer.train_bytes", self.train_bytes)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One component of a mixture.

    path: a file, a folder, a glob, or stdlib:.
    name: what tables and manifests call it; empty takes the last part of the path.
    weight: its share of the windows drawn, relative to the other sources.
    text_key: field or column of the text; empty takes data.text_key.
    max_epochs: passes over it that are allowed, 0 for data.max_epochs.
    """

    path: str = ""
    name: str = ""
    weight: float = 1.0
    text_key: str = ""
    max_epochs: float = 0.0


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training with mixture weights of its own.

    steps: how many steps it lasts; 0 takes tokens, and the last phase may leave both 0.
    tokens: the same in tokens, rounded to whole steps.
    weights: one weight a source, in the order of data.sources.
    """

    steps: int = 0
    tokens: int = 0
    weights: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads and in which order.

    path: a file, a folder, a glob or stdlib:, where there is one source.
    sources: the components of a mixture, in place of path.
    phases: mixture weights that change during the run; empty keeps the sources' weights.
    text_key: field of a JSON line or column of a Parquet file that holds the text.
    rows: what one row of a text file is: file, line or paragraph.
    stdlib_bytes: with stdlib:, stop before more than so many bytes of files; 0 takes all.
    on_bad_row: error, or skip to leave out unreadable rows, counted and listed.
    tokenizer: how text becomes ids.
    add_bos: put the tokenizer's beginning token, if it has one, before each document.
    add_eos: put the tokenizer's end token, if it has one, after each document.
    length: tokens in a window.
    batch_size: windows in a step's batch, over all hosts.
    packing: concat_split, best_fit, first_fit or pad (one document a row).
    max_segments: documents in a window at most, for best_fit and first_fit; 0 for any number.
    buckets: for packing=pad, lengths that batches are padded to; empty pads to length.
    shift: for concat_split, move the cuts by a random offset in each epoch after the first.
    shuffle: draw windows in random order.
    seed: of the order of documents and windows.
    max_epochs: passes over a source that are allowed, more is an error at start; 0 allows any.
    validation_path: text to validate on, in place of a part held out.
    validation_fraction: part of the text held out for validation where there is no validation_path.
    validation_split: hash holds out whole documents by content, tail the last part of the text,
        auto is hash from 100 documents on, else tail.
    workers: processes that make batches; 0 makes them in a thread of the training process.
    prefetch: batches made ahead of the step.
    cache_dir: where tokens are kept; empty lets the caller choose, or ~/.cache/sheaf.
    shard_tokens: tokens in a shard of the token store.
    """

    path: str = ""
    sources: tuple[SourceConfig, ...] = ()
    phases: tuple[PhaseConfig, ...] = ()
    text_key: str = "text"
    rows: str = "file"
    stdlib_bytes: int = 0
    on_bad_row: str = "error"
    tokenizer: TokenizerConfig = TokenizerConfig()
    add_bos: bool = True
    add_eos: bool = True
    length: int = 256
    batch_size: int = 8
    packing: str = "concat_split"
    max_segments: int = 0
    buckets: tuple[int, ...] = ()
    shift: bool = True
    shuffle: bool = True
    seed: int = 0
    max_epochs: float = 0.0
    validation_path: str = ""
    validation_fraction: float = 0.05
    validation_split: str = "auto"
    workers: int = 0
    prefetch: int = 4
    cache_dir: str = ""
    shard_tokens: int = 64 * 2**20

    def __post_init__(self) -> None:
        _choose("data.packing", self.packing, PACKINGS)
        _choose("data.rows", self.rows, ("file", "line", "paragraph"))
        _choose("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        _choose("data.validation_split", self.validation_split, ("auto", "hash", "tail"))
        for name in ("length", "batch_size", "prefetch", "shard_tokens"):
            _positive(f"data.{name}", getattr(self, name))
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: must be 0 or more")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction}: must be in [0, 1)"
            )

    def validate(self) -> None:
        """Check what fields say about one another; `build` calls it."""
        if bool(self.path) == bool(self.sources):
            raise ValueError(
                "data needs one of path and sources; "
                + (
                    "both are set"
                    if self.path
                    else "both are empty: set data.path to a file, a folder, a glob or stdlib:"
                )
            )
        if any(not source.path for source in self.sources):
            raise ValueError("data.sources: a source has an empty path")
        if any(bucket > self.length for bucket in self.buckets):
            raise ValueError(
                f"data.buckets={self.buckets}: none may pass data.length={self.length}"
            )
        for number, phase in enumerate(self.phases):
            _check_phase(number, phase, len(self.components()), number == len(self.phases) - 1)

    def components(self) -> tuple[SourceConfig, ...]:
        """The sources with every default filled in, names made unique."""
        given = self.sources or (SourceConfig(path=self.path),)
        names: list[str] = []
        for source in given:
            name = source.name or source.path.rstrip("/").rsplit("/", 1)[-1] or source.path
            names.append(f"{name}-{len(names)}" if name in names else name)
        return tuple(
            dataclasses.replace(
                source,
                name=name,
                text_key=source.text_key or self.text_key,
                max_epochs=source.max_epochs or self.max_epochs,
            )
            for source, name in zip(given, names, strict=True)
        )


def from_mapping(cls: type, mapping: Mapping[str, Any], prefix: str = "data") -> Any:
    """A config dataclass from nested mappings (a ConfigDict, JSON); unknown fields are errors."""
    hints = get_type_hints(cls)
    fields = {}
    for name in mapping:
        if name not in hints:
            close = nearest(name, hints) or ", ".join(hints)
            raise ValueError(f"{prefix}.{name}: no such field of {cls.__name__}; nearest: {close}")
        fields[name] = _convert(hints[name], mapping[name], f"{prefix}.{name}")
    return cls(**fields)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    return float(value) if hint is float and isinstance(value, int) else value


def _check_phase(number: int, phase: PhaseConfig, sources: int, last: bool) -> None:
    if len(phase.weights) != sources:
        raise ValueError(
            f"data.phases[{number}].weights has {len(phase.weights)} entries for {sources} sources"
        )
    if phase.steps and phase.tokens:
        raise ValueError(f"data.phases[{number}]: give steps or tokens, not both")
    if not (phase.steps or phase.tokens or last):
        raise ValueError(f"data.phases[{number}]: every phase but the last needs steps or tokens")
