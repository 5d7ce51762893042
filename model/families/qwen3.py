"""Qwen 3: Qwen 2 without biases, with a norm on the queries and keys of each head."""

from __future__ import annotations

import dataclasses

from model.families.keys import Keys, key
from model.families.llama import sizes
from model.families.qwen2 import QWEN2, REST
from model.families.tensors import Tensor, norm
from model.families.windows import last_layers, windows

QK_NORMS: tuple[Tensor, ...] = (
    *norm("model.layers.{layer}.self_attn.q_norm", "layers/attention/query_norm"),
    *norm("model.layers.{layer}.self_attn.k_norm", "layers/attention/key_norm"),
)
BIASES: tuple[Keys, ...] = (
    key("attention_bias", "qkv_bias", False),
    key("attention_bias", "output_bias", False),
)

QWEN3 = dataclasses.replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    fixed={"qk_norm": "head"},
    keys=(
        *sizes(vocab_size=151936, d_ff=22016, kv_heads=32, head_dim=128),
        *REST,
        *BIASES,
        windows(last_layers, 32),
    ),
    tensors=(*QWEN2.tensors, *QK_NORMS),
)
