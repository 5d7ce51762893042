"""Mistral: Llama with a sliding window in its first version."""

from __future__ import annotations

import dataclasses

from model.families.keys import Keys, activation, always, key
from model.families.llama import LLAMA, sizes
from model.families.rope import plain_length, rope

NO_BIASES: tuple[Keys, ...] = (
    always("attention_bias", False, written=False),
    always("mlp_bias", False, written=False),
)
"""Keys of Llamas that were saved as Mistral or Mixtral, which have no biases."""

MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    keys=(
        *sizes(d_ff=14336, kv_heads=8),
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(131072),
        rope(10000.0, default_max_length=131072),
        key("sliding_window", "sliding_window", 4096),
        *NO_BIASES,
    ),
)
