"""MiniCPM 1, 2 and 4: Llama with the multipliers of muP, given by the sizes they were tuned at.

Embeddings are multiplied by `scale_emb`, what each part adds by `scale_depth / sqrt(layers)`, and
the logits by `dim_model_base / hidden_size` (Hu et al. 2024, section 3.1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.families.granite import whole
from model.families.keys import Keys, Values, activation, always, key, unread, without
from model.families.llama import LLAMA, sizes
from model.families.rope import plain_length, rope

LAYERS, D_MODEL = 32, 4096
"""Defaults of `num_hidden_layers` and `hidden_size`."""


def multipliers() -> Keys:
    """`scale_emb`, `scale_depth` and `dim_model_base`."""

    def read(values: Values) -> dict[str, Any]:
        layers = values.get("num_hidden_layers", LAYERS)
        return {
            "embedding_scale": float(values.get("scale_emb", 1)),
            "residual_scale": values.get("scale_depth", 1) / math.sqrt(layers),
            "logit_scale": values.get("dim_model_base", 1) / values.get("hidden_size", D_MODEL),
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        return {
            "scale_emb": whole(config.embedding_scale),
            "scale_depth": config.residual_scale * math.sqrt(config.num_layers),
            "dim_model_base": whole(config.logit_scale * config.d_model),
        }

    return Keys(("scale_emb", "scale_depth", "dim_model_base"), read, write)


MINICPM = dataclasses.replace(
    LLAMA,
    name="minicpm",
    model_types=("minicpm",),
    architecture="MiniCPMForCausalLM",
    keys=(
        *without(sizes(), "head_dim"),
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("tie_word_embeddings", "tied_embeddings", True),
        activation("hidden_act", "silu"),
        plain_length(2048),
        rope(10000.0),
        multipliers(),
        key("attention_bias", "qkv_bias", False),
        key("attention_bias", "output_bias", False),
        always("num_experts", 0, 0, None, written=False),
        always("sparse_config", None, written=False),
        unread("mup_denominator"),
    ),
)
