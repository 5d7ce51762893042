"""InternLM 2 and 2.5: Llama whose queries, keys and values are packed by key head."""

from __future__ import annotations

import dataclasses

from model.families.keys import activation, key, without
from model.families.llama import LLAMA, sizes
from model.families.rope import plain_length, rope
from model.families.tensors import by_kv_head, linear, norm, table

INTERNLM2 = dataclasses.replace(
    LLAMA,
    name="internlm2",
    model_types=("internlm2",),
    architecture="InternLM2ForCausalLM",
    keys=(
        *without(sizes(103168), "head_dim"),
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(2048),
        rope(10000.0),
        key("bias", "qkv_bias", True),
        key("bias", "output_bias", True),
    ),
    tensors=(
        *table("model.tok_embeddings", "embed"),
        *norm("model.layers.{layer}.attention_norm", "layers/attention_norm"),
        *linear(
            "model.layers.{layer}.attention.wqkv",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            packing=by_kv_head,
        ),
        *linear("model.layers.{layer}.attention.wo", "layers/attention/output"),
        *norm("model.layers.{layer}.ffn_norm", "layers/feed_forward_norm"),
        *linear("model.layers.{layer}.feed_forward.w1", "layers/feed_forward/gate"),
        *linear("model.layers.{layer}.feed_forward.w3", "layers/feed_forward/up"),
        *linear("model.layers.{layer}.feed_forward.w2", "layers/feed_forward/down"),
        *norm("model.norm", "final_norm"),
        *linear("output", "head"),
    ),
)
