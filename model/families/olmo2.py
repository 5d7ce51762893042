"""OLMo 2: norms on what attention and feed-forward add, and on whole rows of queries and keys."""

from __future__ import annotations

import dataclasses

from model.families.keys import activation, key
from model.families.llama import ATTENTION, FEED_FORWARD, LLAMA, OUTER, sizes
from model.families.qwen3 import BIASES, QK_NORMS
from model.families.rope import plain_length, rope
from model.families.tensors import norm

OLMO2 = dataclasses.replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    fixed={"norm_position": "output", "qk_norm": "full"},
    keys=(
        *sizes(vocab_size=50304),
        key("rms_norm_eps", "norm_eps", 1e-5),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(2048),
        rope(10000.0),
        *BIASES,
    ),
    tensors=(
        *ATTENTION,
        *QK_NORMS,
        *norm("model.layers.{layer}.post_attention_layernorm", "layers/attention_output_norm"),
        *FEED_FORWARD,
        *norm("model.layers.{layer}.post_feedforward_layernorm", "layers/feed_forward_output_norm"),
        *OUTER,
    ),
)
