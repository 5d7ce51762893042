"""Qwen 1.5 MoE and Qwen 2 MoE: mixtures with a gated shared expert, in some or all layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from model.families.keys import Keys, Values, key
from model.families.llama import sizes
from model.families.qwen2 import QWEN2, REST
from model.families.tensors import Tensor, linear
from model.families.windows import even_first_layers, windows

MLP = "model.layers.{layer}.mlp"

EXPERTS: tuple[Tensor, ...] = (
    *linear(f"{MLP}.gate", "layers/feed_forward/router"),
    *linear(f"{MLP}.experts.{{expert}}.gate_proj", "layers/feed_forward/experts/gate"),
    *linear(f"{MLP}.experts.{{expert}}.up_proj", "layers/feed_forward/experts/up"),
    *linear(f"{MLP}.experts.{{expert}}.down_proj", "layers/feed_forward/experts/down"),
)
SHARED_EXPERT: tuple[Tensor, ...] = (
    *linear(f"{MLP}.shared_expert.gate_proj", "layers/feed_forward/shared/gate"),
    *linear(f"{MLP}.shared_expert.up_proj", "layers/feed_forward/shared/up"),
    *linear(f"{MLP}.shared_expert.down_proj", "layers/feed_forward/shared/down"),
    *linear(f"{MLP}.shared_expert_gate", "layers/feed_forward/shared_gate"),
)


def mixture_layers(default_layers: int) -> Keys:
    """`decoder_sparse_step` and `mlp_only_layers`: which layers are mixtures, the rest is gated.

    Every layer whose number, counted from 1, is a multiple of the step is a mixture, unless it is
    listed (from 0) in `mlp_only_layers`.
    """

    def read(values: Values) -> dict[str, Any]:
        step = values.get("decoder_sparse_step", 1)
        listed = values.get("mlp_only_layers") or []
        layers = range(values.get("num_hidden_layers", default_layers))
        dense = (layer for layer in layers if layer in listed or (layer + 1) % step)
        return {"layer_overrides": tuple((layer, "feed_forward", "gated") for layer in dense)}

    def write(config: ModelConfig) -> dict[str, Any]:
        layers = range(config.num_layers)
        dense = [layer for layer in layers if config.layer(layer).feed_forward != "experts"]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Keys(("decoder_sparse_step", "mlp_only_layers"), read, write)


QWEN2_MOE = dataclasses.replace(
    QWEN2,
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    fixed={"feed_forward": "experts", "shared_expert_gate": True},
    keys=(
        *sizes(151936, d_model=2048, d_ff=5632, num_layers=24, num_heads=16, kv_heads=16),
        *REST,
        key("qkv_bias", "qkv_bias", True),
        key("num_experts", "num_experts", 60),
        key("num_experts_per_tok", "experts_per_token", 4),
        key("moe_intermediate_size", "expert_d_ff", 1408),
        key("shared_expert_intermediate_size", "shared_expert_d_ff", 5632),
        key("norm_topk_prob", "router_renormalise", False),
        mixture_layers(24),
        windows(even_first_layers, 24),
    ),
    tensors=(*QWEN2.tensors, *EXPERTS, *SHARED_EXPERT),
)
