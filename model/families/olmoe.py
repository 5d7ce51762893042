"""OLMoE: mixtures in all layers, with norms over whole rows of queries and keys."""

from __future__ import annotations

import dataclasses

from model.families.keys import activation, always, key
from model.families.llama import ATTENTION, LLAMA, NORMS, OUTER, sizes
from model.families.mixtral import expert_width
from model.families.qwen2_moe import EXPERTS
from model.families.qwen3 import BIASES, QK_NORMS
from model.families.rope import plain_length, rope

OLMOE = dataclasses.replace(
    LLAMA,
    name="olmoe",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    fixed={"feed_forward": "experts", "qk_norm": "full"},
    keys=(
        *sizes(vocab_size=50304, d_model=2048, num_layers=16, num_heads=16),
        *expert_width("intermediate_size", 2048),
        key("num_experts", "num_experts", 64),
        key("num_experts_per_tok", "experts_per_token", 8),
        key("norm_topk_prob", "router_renormalise", False),
        key("rms_norm_eps", "norm_eps", 1e-5),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(4096),
        rope(10000.0, default_max_length=4096),
        always("clip_qkv", None),
        *BIASES,
    ),
    tensors=(*ATTENTION, *QK_NORMS, *EXPERTS, *NORMS, *OUTER),
)
