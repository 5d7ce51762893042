"""Phi-3, Phi-3.5 and Phi-4: Llama with packed projections, and LongRoPE for long texts."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from model.families.keys import FamilyError, Keys, Values, activation, always, key, unread
from model.families.llama import LLAMA, NORMS, OUTER, sizes
from model.families.rope import plain_length, rope
from model.families.tensors import Tensor, contiguous, linear

TRAINED_LENGTH = 4096
"""The default of `original_max_position_embeddings`, which stands beside the scaling."""


def longrope() -> Keys:
    """`rope`, of which Phi-3 knows LongRoPE only."""
    keys = rope(10000.0, default_max_length=TRAINED_LENGTH, partial=1.0, default_sizes=(3072, 32))

    def read(values: Values) -> dict[str, Any]:
        fields = keys.read({"original_max_position_embeddings": TRAINED_LENGTH, **values})
        found = fields["rope_scaling"]
        if found is not None and found.kind != "longrope":
            raise FamilyError(f"rope_scaling is {found.kind!r}; Phi-3 knows 'longrope' only")
        return fields

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"original_max_position_embeddings": TRAINED_LENGTH, **keys.write(config)}

    return Keys(keys.names, read, write)


PACKED: tuple[Tensor, ...] = (
    *linear(
        "model.layers.{layer}.self_attn.qkv_proj",
        "layers/attention/query",
        "layers/attention/key",
        "layers/attention/value",
        packing=contiguous,
    ),
    *linear("model.layers.{layer}.self_attn.o_proj", "layers/attention/output"),
    *linear(
        "model.layers.{layer}.mlp.gate_up_proj",
        "layers/feed_forward/gate",
        "layers/feed_forward/up",
        packing=contiguous,
    ),
    *linear("model.layers.{layer}.mlp.down_proj", "layers/feed_forward/down"),
)

PHI3 = dataclasses.replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    keys=(
        *sizes(32064, 3072, 8192),
        key("rms_norm_eps", "norm_eps", 1e-5),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(TRAINED_LENGTH),
        longrope(),
        key("sliding_window", "sliding_window", None),
        always("attention_bias", False, written=False),
        always("mlp_bias", False, written=False),
        always("lm_head_bias", False, written=False),
        unread("full_attn_mod", "interpolate_factor"),
    ),
    tensors=(*PACKED, *NORMS, *OUTER),
)
