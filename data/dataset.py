"""`build`: from a `DataConfig` to loaders, doing once whatever the cache does not hold yet.

Sources are opened, the tokenizer is loaded or trained, documents are tokenised into stores, some
are held out for validation, and windows are planned. A second call finds all of it by fingerprint.

"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from data import record
from data.config import DataConfig, PhaseConfig, SourceConfig
from data.files import HashCache, full_disk_explained
from data.loader import Component, Loader, ValidationLoader
from data.order import Mixture, Order, Phase, key
from data.packing import Plan, Spans, cached_plan, make_plan
from data.sources import Source, SourceError, open_source
from data.splits import bytes_and_targets, split
from data.store import StoreOptions, TokenStore, store_fingerprint
from data.tokenizers import Tokenizer
from data.tokenizing import Say, tokenize
from data.vocabulary import make_tokenizer

Part = tuple[str, TokenStore, Spans]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """All that a run needs of its data.

    config: what it was built from.
    tokenizer: the one the text was encoded with.
    train: batches by step.
    validation: every held-out token once, or None where nothing is held out.
    bytes_per_token: UTF-8 bytes of text for each token predicted, of the validation text where
        there
        is one: nats per token / (ln 2 · bytes_per_token) is bits per byte.
    """

    config: DataConfig
    tokenizer: Tokenizer
    train: Loader
    validation: ValidationLoader | None
    bytes_per_token: float

    def epochs(self, steps: int) -> list[float]:
        """Passes over each source after `steps` steps."""
        order = self.train.order
        drawn = order.drawn(order.batch_index(steps)).tolist()
        return [n / c.plan.windows for n, c in zip(drawn, self.train.components, strict=True)]

    def describe(self, steps: int | None = None) -> str:
        """A table of the sources; with `steps`, also what so many steps draw from each."""
        return record.table(self, steps)

    def check(self, steps: int) -> None:
        """Raise if `steps` steps pass over a source more often than its `max_epochs` allows."""
        for source, epochs in zip(self.config.components(), self.epochs(steps), strict=True):
            if source.max_epochs and epochs > source.max_epochs:
                raise ValueError(
                    f"{steps} steps pass {epochs:.2f} times over source {source.name!r}, more than "
                    f"max_epochs={source.max_epochs:g}: train fewer steps, give it less weight, "
                    f"add text or raise max_epochs\n{self.describe(steps)}"
                )

    def manifest(self) -> dict[str, Any]:
        """What the batches are made of, as JSON; `check_resume` compares two of them."""
        return record.manifest(self)

    def with_skips(self, skips: tuple[tuple[int, int], ...]) -> Dataset:
        """The same dataset whose training never uses the batches in these half-open ranges."""
        return dataclasses.replace(self, train=self.train.with_skips(skips))


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
    """The dataset of a config.

    Args:
        config: what to read; its `cache_dir` goes before the argument.
        cache_dir: where tokens are kept if the config does not say; `~/.cache/sheaf` by default.
        tokenizer: one to use in place of the config's, e.g. that of the checkpoint a run starts
            from.
        say: takes each line to show.

    Raises:
        SourceError: nothing to read at a path.
        BadRowError: a row that cannot be read.
        ValueError: settings that do not fit together.
    """
    config.validate()
    cache = Path(config.cache_dir or cache_dir or default_cache()).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(cache):
        return _build(config, cache, tokenizer, say)


def _build(config: DataConfig, cache: Path, tokenizer: Tokenizer | None, say: Say) -> Dataset:
    sources = [_open(config, source) for source in config.components()]
    if config.validation_path:
        sources.append(
            _open(config, SourceConfig(config.validation_path, text_key=config.text_key))
        )
    hashes = HashCache(cache / "hashes.json")
    fingerprints = [source.fingerprint(hashes) for source in sources]
    tokenizer = tokenizer or make_tokenizer(config, sources, fingerprints, cache, say)
    stores = [
        _store(config, source, of_source, tokenizer, cache, say)
        for source, of_source in zip(sources, fingerprints, strict=True)
    ]
    train, held_out = _parts(config, stores)
    components = [
        Component(name, store, _plan(config, store, spans, cache, name))
        for name, store, spans in train
    ]
    shared = (config.length, config.batch_size, config.seed, tuple(sorted(config.buckets)))
    ahead = (config.workers, config.prefetch)
    loader = Loader(
        tuple(components), *shared, *ahead, order=_order(config), shuffle=config.shuffle
    )
    validation = None
    if held_out:
        planned = [
            Component(name, store, _plan(config, store, spans, cache, None))
            for name, store, spans in held_out
        ]
        validation = ValidationLoader(tuple(planned), *shared, *ahead)
    ratio = _bytes_per_token(held_out or train, tokenizer)
    return Dataset(config, tokenizer, loader, validation, ratio)


def _open(config: DataConfig, source: SourceConfig) -> Source:
    return open_source(source.path, source.text_key, config.rows, config.stdlib_bytes)


def _store(
    config: DataConfig,
    source: Source,
    of_source: str,
    tokenizer: Tokenizer,
    cache: Path,
    say: Say,
) -> TokenStore:
    options = StoreOptions(config.add_bos, config.add_eos, config.on_bad_row, config.shard_tokens)
    name = store_fingerprint(of_source, tokenizer.fingerprint, options)[:20]
    return tokenize(source, tokenizer, cache / "tokens" / name, options, say, of_source)


def _parts(config: DataConfig, stores: list[TokenStore]) -> tuple[list[Part], list[Part]]:
    """What is trained on and what is held out, by source."""
    names = [source.name for source in config.components()]
    fraction = 0.0 if config.validation_path else config.validation_fraction
    train: list[Part] = []
    held_out: list[Part] = []
    for name, store in zip(names, stores, strict=False):
        trained, held = split(store, fraction, config.validation_split)
        if not trained.tokens:
            raise SourceError(
                f"source {name!r}: validation_fraction={fraction} takes all of its text "
                f"({len(store)} documents); hold out less, or use validation_split=tail"
            )
        train.append((name, store, trained))
        held_out.append((name, store, held))
    if config.validation_path:
        held_out = [("validation", stores[-1], split(stores[-1], 0.0, "hash")[0])]
    if sum(held.tokens for _, _, held in held_out) > 0:
        return train, held_out
    if fraction:
        raise SourceError(
            f"validation_fraction={fraction} holds out no document of "
            f"{sum(map(len, stores))}: use validation_split=tail to hold out the last part of the "
            "text, a larger fraction, validation_path, or 0 for no validation"
        )
    return train, []


def _plan(
    config: DataConfig, store: TokenStore, spans: Spans, cache: Path, name: str | None
) -> Plan:
    """The plan of a training source, or without a name of validation text, in its order."""
    seed = key(config.seed, name) >> 1 if name is not None and config.shuffle else None
    fraction = 0.0 if config.validation_path else config.validation_fraction
    parts = [
        store.manifest["fingerprint"],
        [name is not None, seed, fraction, config.validation_split],
        [config.packing, config.length, config.shift, config.max_segments],
    ]
    make = functools.partial(
        make_plan,
        spans,
        config.packing,
        config.length,
        seed=seed,
        shift=config.shift,
        max_segments=config.max_segments,
    )
    return cached_plan(cache / "plans", parts, make)


def _order(config: DataConfig) -> Order:
    weights = tuple(source.weight for source in config.components())
    phases, start = [], 0
    for phase in config.phases or (PhaseConfig(weights=weights),):
        phases.append(Phase(start, Mixture.from_floats(phase.weights)))
        start += phase.steps or round(phase.tokens / (config.batch_size * config.length))
    return Order(tuple(phases), config.batch_size)


def _bytes_per_token(parts: list[Part], tokenizer: Tokenizer) -> float:
    counted = [bytes_and_targets(store, spans, tokenizer) for _, store, spans in parts]
    size, targets = (sum(column) for column in zip(*counted, strict=True))
    if not targets:
        names = ", ".join(name for name, _, _ in parts)
        raise SourceError(f"{names}: too little text, not one token can be predicted")
    return size / targets
