"""An engine small enough for a test: a Llama of two layers over bytes, with few pages."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data import ByteTokenizer
from model import ModelConfig, abstract
from model.checkpoint import Checkpoint
from serving import Engine, EngineSettings
from serving.sampling_settings import Room

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=2, num_heads=4, kv_heads=2, d_ff=24,
    layer_overrides=((1, "sliding_window", 6),),
)  # fmt: skip
SETTINGS = EngineSettings(
    max_model_len=48, max_num_seqs=4, max_num_batched_tokens=16, page_size=4, num_pages=20,
    decode_sizes=(4,), chunk_sizes=(16,), page_widths=(12,), max_logprobs=3, warm_up=False,
    room=Room(biases=2, ends=2, words=4, word_tokens=4), max_waiting=300,
)  # fmt: skip


@functools.cache
def params_of(config=CONFIG):
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


def checkpoint(files=None):
    files = TOKENIZER.files() if files is None else files
    return Checkpoint(CONFIG, params_of(), files, {}, Path("runs/tiny/checkpoints/00000009"))


def engine_of(**changes):
    return Engine(checkpoint(), dataclasses.replace(SETTINGS, **changes))
