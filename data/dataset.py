"""`build`: from a `DataConfig` to loaders, doing once whatever is not cached yet.

Sources are opened, the tokenizer is loaded or trained, documents are tokenised into stores, some are held out for
validation, and windows are planned. The `Dataset` that comes back knows what it is made of (`manifest`) and can say
it in a table (`describe`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, PhaseConfig, SourceConfig
from data.loader import Component, Loader, ValidationLoader
from data.order import Mixture, Order, Phase, key, permute
from data.packing import Plan, Spans, cached_plan, make_plan
from data.sources import FILE_STRIDE, Source, SourceError, file_hash, open_source
from data.store import Say, StoreOptions, TokenStore, store_fingerprint, tokenize
from data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
)

BIG_FILE = 4 * 2**20
FOLDS = 2**32


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """All that a run needs of its data. `validation` is None where nothing is held out."""

    config: DataConfig
    tokenizer: Tokenizer
    train: Loader
    validation: ValidationLoader | None
    bytes_per_token: float
    stores: tuple[TokenStore, ...]

    def epochs(self, steps: int) -> list[float]:
        """Passes over each source after `steps` steps."""
        drawn = self.train.order.drawn(self.train.order.batch_index(steps))
        windows = [component.plan.windows for component in self.train.components]
        return [int(count) / size for count, size in zip(drawn, windows, strict=True)]

    def describe(self, steps: int | None = None) -> str:
        """A table of sources: documents, tokens, weight, windows there and drawn, epochs."""
        return _table(self, steps)

    def check(self, steps: int) -> None:
        """Raise if `steps` steps pass over a source more often than its `max_epochs` allows."""
        for source, epochs in zip(self.config.components(), self.epochs(steps), strict=True):
            if source.max_epochs and epochs > source.max_epochs:
                raise ValueError(
                    f"{steps} steps pass {epochs:.2f} times over source {source.name!r}, more than "
                    f"max_epochs={source.max_epochs:g}: train fewer steps, give it less weight, add text or raise "
                    f"max_epochs\n{self.describe(steps)}"
                )

    def manifest(self) -> dict[str, Any]:
        """What the batches are made of, as JSON: equal manifests give equal batches."""
        return {
            "sources": [
                {
                    "name": component.name,
                    "path": store.manifest["source"]["spec"],
                    "fingerprint": store.manifest["source"]["fingerprint"],
                    "tokens": store.manifest["fingerprint"],
                    "counts": store.manifest["counts"],
                    "windows": component.plan.windows,
                }
                for component, store in zip(self.train.components, self.stores, strict=True)
            ],
            "validation": self.validation and {
                "tokens": [c.store.manifest["fingerprint"] for c in self.validation.components],
                "windows": [c.plan.windows for c in self.validation.components],
            },
            "tokenizer": self.tokenizer.fingerprint,
            "bytes_per_token": self.bytes_per_token,
            "phases": [
                {"start": phase.start, "weights": list(phase.mixture.weights)}
                for phase in self.train.order.phases
            ],
            "order": {
                name: getattr(self.config, name)
                for name in ("length", "batch_size", "packing", "max_segments", "shift", "shuffle", "seed",
                             "validation_fraction", "validation_split")
            },
        }  # fmt: skip


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/sheaf`, or `~/.cache/sheaf`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sheaf"


def build(
    config: DataConfig,
    cache_dir: str | os.PathLike | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    say: Say = print,
) -> Dataset:
    """The dataset of a config; tokens are kept in `config.cache_dir`, else `cache_dir`, else `~/.cache/sheaf`.

    Args:
        config: what to read.
        cache_dir: where tokens are kept if the config does not say.
        tokenizer: one to use in place of the config's, e.g. that of the checkpoint a run continues from.
        say: takes each line to show.

    Raises:
        SourceError, BadRowError: nothing to read at a path, or a row that cannot be read.
        ValueError: settings that do not fit together.
    """
    config.validate()
    cache = Path(config.cache_dir or cache_dir or default_cache()).expanduser()
    hashes = _HashCache(cache / "hashes.json")
    sources = [_open(config, source) for source in config.components()]
    held_out = (
        _open(config, SourceConfig(config.validation_path, text_key=config.text_key))
        if (config.validation_path)
        else None
    )
    every = [*sources, *([held_out] if held_out else [])]
    prints = [source.fingerprint(hashes) for source in every]
    tokenizer = tokenizer or _make_tokenizer(config, every, prints, cache, say)
    stores = [
        _store(config, source, fingerprint, tokenizer, cache, say)
        for source, fingerprint in zip(every, prints, strict=True)
    ]
    trained = stores[: len(sources)]
    names = [source.name for source in config.components()]
    splits = [split(store, _held_fraction(config), config.validation_split) for store in trained]
    components = []
    for name, store, (train, _) in zip(names, trained, splits, strict=True):
        if not train.tokens:
            raise SourceError(
                f"source {name!r}: validation takes all of its text; nothing is left to train on"
            )
        plan = _plan(config, store, train, cache, "train", key(config.seed, name) >> 1)
        components.append(Component(name, store, plan))
    if held_out:
        checked = [("validation", stores[-1], split(stores[-1], 0.0, "hash")[0])]
    else:
        checked = [(n, s, spans) for n, s, (_, spans) in zip(names, trained, splits, strict=True)]
    validation = _validation(config, checked, cache)
    measured = (
        checked
        if validation
        else [(n, s, spans) for n, s, (spans, _) in zip(names, trained, splits, strict=True)]
    )
    loader = Loader(
        components=tuple(components),
        length=config.length,
        batch_size=config.batch_size,
        seed=config.seed,
        buckets=config.buckets,
        workers=config.workers,
        prefetch=config.prefetch,
        order=_order(config),
        shuffle=config.shuffle,
    )  # fmt: skip
    ratio = _bytes_per_target([(store, spans) for _, store, spans in measured], tokenizer)
    return Dataset(config, tokenizer, loader, validation, ratio, tuple(trained))


def split(store: TokenStore, fraction: float, how: str) -> tuple[Spans, Spans]:
    """`(train, validation)` spans of a store; together they are every token, once.

    "hash" holds out whole documents by the hash of their text, so that equal texts go to the same side; "tail"
    holds out the last part of the tokens, cutting one document (nanoGPT's split of Shakespeare).
    """
    lengths = store.lengths
    every = Spans(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    none = every.take(np.zeros(0, np.int64))
    if fraction <= 0:
        return every, none
    if how == "hash":
        held = (store.hashes % FOLDS) < int(fraction * FOLDS)
        return every.take(np.flatnonzero(~held)), every.take(np.flatnonzero(held))
    total = int(lengths.sum())
    cut = int(total * (1 - fraction))
    begins = np.cumsum(lengths) - lengths
    before = np.clip(cut - begins, 0, lengths)
    head = Spans(every.document, every.start, before)
    tail = Spans(every.document, before, lengths - before)
    return head.take(np.flatnonzero(before)), tail.take(np.flatnonzero(tail.length))


def _held_fraction(config: DataConfig) -> float:
    return 0.0 if config.validation_path else config.validation_fraction


def _open(config: DataConfig, source: SourceConfig) -> Source:
    return open_source(source.path, source.text_key, config.rows, config.stdlib_bytes)


def _store(
    config: DataConfig,
    source: Source,
    fingerprint: str,
    tokenizer: Tokenizer,
    cache: Path,
    say: Say,
) -> TokenStore:
    options = StoreOptions(config.add_bos, config.add_eos, config.on_bad_row, config.shard_tokens)
    name = store_fingerprint(fingerprint, tokenizer.fingerprint, options)[:20]
    return tokenize(source, tokenizer, cache / "tokens" / name, options, say, fingerprint)


def _plan(
    config: DataConfig, store: TokenStore, spans: Spans, cache: Path, part: str, seed: int | None
) -> Plan:
    settings = [config.packing, config.length, config.shift, config.max_segments]
    held = [_held_fraction(config), config.validation_split]
    parts = [store.manifest["fingerprint"], part, seed, settings, held]
    make = functools.partial(
        make_plan, spans, config.packing, config.length,
        seed=seed, shift=config.shift, max_segments=config.max_segments,
    )  # fmt: skip
    return cached_plan(cache / "plans", parts, make)


def _validation(
    config: DataConfig, parts: list[tuple[str, TokenStore, Spans]], cache: Path
) -> ValidationLoader | None:
    if not any(spans.tokens for _, _, spans in parts):
        if config.validation_fraction and not config.validation_path:
            raise SourceError(
                f"validation_fraction={config.validation_fraction} holds out no document of "
                f"{sum(len(store) for _, store, _ in parts)}: use validation_split=tail to hold out the last part "
                "of the text, a larger fraction, validation_path, or 0 for none"
            )
        return None
    components = tuple(
        Component(name, store, _plan(config, store, spans, cache, "validation", None))
        for name, store, spans in parts
    )
    return ValidationLoader(
        components, config.length, config.batch_size, config.seed, config.buckets,
        config.workers, config.prefetch,
    )  # fmt: skip


def _order(config: DataConfig) -> Order:
    weights = tuple(source.weight for source in config.components())
    phases, start = [], 0
    for phase in config.phases or (PhaseConfig(weights=weights),):
        phases.append(Phase(start, Mixture.from_floats(phase.weights)))
        start += phase.steps or round(phase.tokens / (config.batch_size * config.length))
    return Order(tuple(phases), config.batch_size)


def _bytes_per_target(parts: list[tuple[TokenStore, Spans]], tokenizer: Tokenizer) -> float:
    """UTF-8 bytes of the text over the number of tokens that are predicted."""
    size = targets = 0
    for store, spans in parts:
        whole = spans.length == store.lengths[spans.document]
        size += int(store.text_bytes[spans.document[whole]].sum())
        for i in np.flatnonzero(~whole):
            ids = store.tokens(int(spans.document[i]), int(spans.start[i]), int(spans.length[i]))
            kept = [t for t in ids.tolist() if t not in (tokenizer.bos, tokenizer.eos)]
            size += len(tokenizer.decode(kept).encode())
        targets += spans.tokens - int((spans.length > 0).sum())
    return size / targets if targets else math.nan


def _make_tokenizer(
    config: DataConfig, sources: list[Source], prints: list[str], cache: Path, say: Say
) -> Tokenizer:
    settings = config.tokenizer
    if settings.kind == "bytes":
        return ByteTokenizer()
    if settings.kind == "file":
        return load_tokenizer(settings.path, settings.bos, settings.eos)
    parts = (2, prints, settings.kind, settings.vocab_size, settings.train_bytes, config.on_bad_row)
    folder = cache / "tokenizers" / f"{key(*parts):016x}"
    if folder.exists():
        return load_tokenizer(folder, settings.bos, settings.eos)
    say(f"training a {settings.kind} tokenizer on {', '.join(source.spec for source in sources)}")
    if settings.kind == "characters":
        made: Tokenizer = CharacterTokenizer.train(_texts(config, sources))
    else:
        made = FileTokenizer.train(_sample(config, sources), settings.vocab_size)
        if made.vocab_size < settings.vocab_size:
            say(
                f"the text gives {made.vocab_size} tokens, fewer than vocab_size={settings.vocab_size}"
            )
    save_files(folder, made.files())
    return load_tokenizer(folder, settings.bos, settings.eos)


def save_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder that appears whole, by rename."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():  # another process may have made the same one
            raise


def _texts(config: DataConfig, sources: list[Source]) -> Iterator[str]:
    for row in itertools.chain.from_iterable(source.rows() for source in sources):
        if row.error is not None and config.on_bad_row == "error":
            raise row.error
        if row.text:
            yield row.text


def _sample(config: DataConfig, sources: list[Source]) -> Iterator[str]:
    """Text to train a tokenizer on: `train_bytes` in all, the same share from every file of every training source."""
    files = [(source, number) for source in sources for number in range(len(source.files))]
    order = np.atleast_1d(permute(np.arange(len(files)), len(files), key("tokenizer")))
    left = config.tokenizer.train_bytes
    share = max(left // len(files), 2**16)
    for source, number in (files[i] for i in order.tolist()):
        quota = min(share, left)
        for row in source.rows(number * FILE_STRIDE):
            if row.row_id // FILE_STRIDE != number or quota <= 0:
                break
            if row.error is not None and config.on_bad_row == "error":
                raise row.error
            text = (row.text or "")[:quota]
            quota -= len(text)
            left -= len(text)
            yield text
        if left <= 0:
            return


class _HashCache:
    """Hashes of large files by path, size and time of change, so that a rerun need not read them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, path: str) -> str:
        status = os.stat(path)
        if status.st_size < BIG_FILE:
            return file_hash(path)
        name = f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}"
        if name not in self._known:
            self._known[name] = file_hash(path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(self._known, indent=1))
            os.replace(partial, self._path)
        return self._known[name]


def _table(dataset: Dataset, steps: int | None) -> str:
    heads = ["source", "documents", "tokens", "weight", "windows"]
    heads += ["drawn", "epochs"] if steps is not None else []
    order = dataset.train.order
    epochs = dataset.epochs(steps or 0)
    drawn = order.drawn(order.batch_index(steps or 0))
    lines = [heads]
    for i, component in enumerate(dataset.train.components):
        counts = component.store.manifest["counts"]
        weights = [p.mixture.weights[i] / sum(p.mixture.weights) for p in order.phases]
        line = [
            component.name,
            f"{counts['documents']:,}",
            f"{counts['tokens']:,}",
            " > ".join(f"{weight:.3g}" for weight in weights),
            f"{component.plan.windows:,}",
        ]
        lines.append(line + ([f"{drawn[i]:,}", f"{epochs[i]:.2f}"] if steps is not None else []))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    notes = [
        f"windows of {dataset.config.length} tokens ({dataset.config.packing}), {dataset.bytes_per_token:.3f} bytes a token, "
        f"vocabulary {dataset.tokenizer.vocab_size:,}"
    ]
    if dataset.validation:
        windows = sum(c.plan.windows for c in dataset.validation.components)
        notes.append(f"validation: {windows:,} windows in {len(dataset.validation)} batches")
    for component in dataset.train.components:
        manifest = component.store.manifest
        for count, what in (
            (manifest["counts"]["bad_rows"], "bad rows skipped"),
            (manifest["counts"]["empty"], "empty rows"),
        ):
            notes += [f"{component.name}: {count} {what}"] if count else []
        if ignored := manifest["source"]["ignored"]:
            held = ", ".join(f"{count} {suffix}" for suffix, count in ignored.items())
            notes.append(f"{component.name}: files of the folder left out, not text: {held}")
    return "\n".join(text + notes)
