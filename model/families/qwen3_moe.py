"""Qwen 3 MoE (30B-A3B, 235B-A22B, Coder): Qwen 3 with mixtures and without a shared expert."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from model.families.keys import FamilyError, Keys, Values, always, key
from model.families.llama import sizes
from model.families.qwen2 import REST
from model.families.qwen2_moe import EXPERTS, mixture_layers
from model.families.qwen3 import BIASES, QWEN3


def _read_window(values: Values) -> dict[str, Any]:
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    if window is not None and values.get("max_window_layers"):
        raise FamilyError(
            f"max_window_layers is {values['max_window_layers']} and use_sliding_window is True; "
            "the windows of this family are in all layers"
        )
    return {"sliding_window": window}


def _write_window(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window}


WINDOW = Keys(
    ("use_sliding_window", "sliding_window", "max_window_layers"), _read_window, _write_window
)
"""One window for all layers; published files still hold `max_window_layers`, which says nothing."""

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    fixed={"feed_forward": "experts", "qk_norm": "head"},
    keys=(
        *sizes(151936, d_model=2048, d_ff=6144, num_layers=24, kv_heads=4),
        *REST,
        *BIASES,
        key("num_experts", "num_experts", 128, also=("num_local_experts",)),
        key("num_experts_per_tok", "experts_per_token", 8),
        key("moe_intermediate_size", "expert_d_ff", 768),
        key("norm_topk_prob", "router_renormalise", False),
        mixture_layers(24),
        WINDOW,
        always("qkv_bias", False, written=False),
        always("shared_expert_intermediate_size", 0, written=False),
        always("use_qk_norm", True, written=False),
    ),
    tensors=(*QWEN3.tensors, *EXPERTS),
)
