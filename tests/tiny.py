"""A run small enough for a test: a byte-level Llama of two layers on generated text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training import RunConfig, default_config, run_config

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "an",
    "old",
    "dog",
    "run",
    "while",
    "rain",
]


def write_text(folder: Path, documents: int = 40, words: int = 60) -> Path:
    """JSON lines of random sentences, the same every time."""
    rng = np.random.default_rng(0)
    path = folder / "text.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (" ".join(rng.choice(WORDS, words)) for _ in range(documents))
    path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines))
    return path


def tiny_values(text: Path, **fields):
    """The config of a tiny run as a ConfigDict; fields are set by dotted names with `__` as dot."""
    config = default_config()
    config.name = "tiny"
    config.data.path = str(text)
    config.data.cache_dir = str(text.parent / "cache")
    config.data.tokenizer.kind = "bytes"
    config.data.length = 32
    config.data.batch_size = 8
    config.data.validation_fraction = 0.2
    config.model.vocab_size = 264
    config.model.d_model = 32
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.kv_heads = 2
    config.model.d_ff = 64
    config.model.tied_embeddings = True
    config.train.steps = 6
    config.train.log_every = 2
    config.optimizer.learning_rate = 1e-2
    config.checkpoint.every = 3
    for name, value in fields.items():
        *parents, field = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[field] = value
    return config


def tiny_config(text: Path, **fields) -> RunConfig:
    """The same, checked and frozen."""
    return run_config(tiny_values(text, **fields))
