"""Qwen 1.5, 2 and 2.5: Llama with biases on query, key and value."""

from __future__ import annotations

import dataclasses

from model.families.keys import Keys, activation, always, key
from model.families.llama import LLAMA, sizes
from model.families.rope import plain_length, rope
from model.families.windows import last_layers, windows

REST: tuple[Keys, ...] = (
    key("rms_norm_eps", "norm_eps", 1e-6),
    key("tie_word_embeddings", "tied_embeddings", False),
    activation("hidden_act", "silu"),
    plain_length(32768),
    rope(10000.0, default_max_length=32768),
    always("use_mrope", False, written=False),
)
"""Keys that all Qwens share, but for sizes, biases and windows."""

QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    fixed={"qkv_bias": True},
    keys=(
        *sizes(vocab_size=151936, d_ff=22016, kv_heads=32),
        *REST,
        windows(last_layers, 32),
    ),
)
