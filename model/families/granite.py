"""Granite 3: Llama with factors on embeddings, scores, residuals and logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.families.keys import Keys, Values, key
from model.families.llama import LLAMA


def whole(value: float) -> float | int:
    """A number that a formula and its inverse left a rounding away from an integer, or itself."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def divided_logits() -> Keys:
    """`logits_scaling`, which divides."""

    def read(values: Values) -> dict[str, Any]:
        return {"logit_scale": 1.0 / values.get("logits_scaling", 1.0)}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"logits_scaling": whole(1.0 / config.logit_scale)}

    return Keys(("logits_scaling",), read, write)


GRANITE = dataclasses.replace(
    LLAMA,
    name="granite",
    model_types=("granite",),
    architecture="GraniteForCausalLM",
    keys=(
        *LLAMA.keys,
        key("embedding_multiplier", "embedding_scale", 1.0),
        key("attention_multiplier", "attention_scale", 1.0),
        key("residual_multiplier", "residual_scale", 1.0),
        divided_logits(),
    ),
)
