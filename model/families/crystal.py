"""Cerebras' GPT-2 with muP and its descendants: CrystalCoder (LLM360), BTLM, Jais.

Their code multiplies the embeddings, the scores and the logits by factors of the config, and has
SwiGLU, ALiBi and interleaved RoPE as options. Their second input projection, `c_fc2`, is the gate.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.gpt2 import FIXED, SIZES, TENSORS, WIDTH, attention_scales
from model.families.keys import FamilyError, Keys, Values, activation
from model.families.tensors import Tensor, conv1d

ACTIVATION = activation("activation_function", "gelu_new")


def feed_forward() -> Keys:
    """`activation_function`, whose "swiglu" is a gated feed-forward."""

    def read(values: Values) -> dict[str, Any]:
        if values.get("activation_function") == "swiglu":
            return {"feed_forward": "gated", "activation": "silu"}
        return {"feed_forward": "plain", **ACTIVATION.read(values)}

    def write(config: ModelConfig) -> dict[str, Any]:
        if config.feed_forward == "gated":
            return {"activation_function": "swiglu"}
        return ACTIVATION.write(config)

    return Keys(ACTIVATION.names, read, write)


def multipliers() -> Keys:
    """Factors of muP on embeddings and logits; Jais-13B has its own words for them.

    `mup_width_scale` is the base model's width over this one's, by which the learning rates of
    hidden matrices are scaled too.
    """
    names = ("mup_embeddings_scale", "mup_output_alpha", "mup_width_scale")

    def read(values: Values) -> dict[str, Any]:
        embeddings = values.get("embeddings_scale", values.get("mup_embeddings_scale", 1.0))
        width = values.get("mup_width_scale", 1.0)
        base = WIDTH.read(values)["d_model"] * width
        return {
            "embedding_scale": float(embeddings),
            "position_scale": float(embeddings) if _kind(values) == "learned" else 1.0,
            "logit_scale": float(
                values.get("width_scale", values.get("mup_output_alpha", 1.0) * width)
            ),
            "base_d_model": round(base)
            if width != 1.0 and math.isclose(base, round(base))
            else None,
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        width = (config.base_d_model or config.d_model) / config.d_model
        return {
            "mup_embeddings_scale": config.embedding_scale,
            "mup_output_alpha": config.logit_scale / width,
            "mup_width_scale": width,
        }

    return Keys((*names, "embeddings_scale", "width_scale"), read, write)


def positions(*kinds: str) -> Keys:
    """`position_embedding_type`, one of `kinds`, with what belongs to it."""

    def read(values: Values) -> dict[str, Any]:
        kind = _kind(values)
        if kind not in kinds:
            known = ", ".join(kinds)
            raise FamilyError(f"position_embedding_type is {kind!r}; known: {known}")
        if kind == "alibi":
            return {"positions": "alibi", "alibi_scale": _alibi_scale(values)}
        if kind == "learned":
            return {"positions": "learned"}
        if not values.get("rotary_dim"):
            raise FamilyError("rotary_dim is missing, which position_embedding_type rotary needs")
        return {"positions": "rope", "rotary_dim": values["rotary_dim"]}

    def write(config: ModelConfig) -> dict[str, Any]:
        kind = "rotary" if config.positions == "rope" else config.positions
        values: dict[str, Any] = {"position_embedding_type": kind}
        if kind == "rotary":
            values["rotary_dim"] = config.rotary_dim
        if kind == "alibi" and config.alibi_scale != 1.0:
            values["alibi_scaling"] = {"type": "linear", "factor": 1.0 / config.alibi_scale}
        return values

    return Keys(("position_embedding_type", "rotary_dim", "alibi_scaling"), read, write)


def _kind(values: Values) -> str:
    return values.get("position_embedding_type", "learned")


def _alibi_scale(values: Values) -> float:
    """Slopes are divided by a fixed factor (position interpolation, Al-Khateeb et al. 2023)."""
    scaling = values.get("alibi_scaling")
    if scaling is None:
        return 1.0
    if scaling.get("type") != "linear" or set(scaling) != {"type", "factor"}:
        raise FamilyError(
            f"alibi_scaling is {scaling!r}; only a linear one with a fixed factor is supported"
        )
    return 1.0 / scaling["factor"]


GATED: tuple[Tensor, ...] = (
    *TENSORS,
    *conv1d("transformer.h.{layer}.mlp.c_fc2", "layers/feed_forward/gate"),
)

KEYS: tuple[Keys, ...] = (
    *SIZES,
    feed_forward(),
    multipliers(),
    attention_scales("mup_scale_qk_dot_by_d", also=("scale_qk_dot_by_d",)),
)

CRYSTAL = Family(
    name="crystal",
    model_types=("crystalcoder",),
    architecture="CrystalCoderLMHeadModel",
    fixed={**FIXED, "rotary_layout": "interleaved"},
    keys=(*KEYS, positions("rotary", "learned", "alibi")),
    tensors=GATED,
    prefix="transformer.",
    buffers=(r"(.*\.)?attn\.(masked_)?bias", r"(.*\.)?relative_pe\.slopes"),
    stores_tied_head=True,
)

BTLM = dataclasses.replace(
    CRYSTAL,
    name="btlm",
    model_types=("btlm",),
    architecture="BTLMLMHeadModel",
    fixed=FIXED,
    keys=(*KEYS, positions("alibi", "learned")),
)

JAIS = dataclasses.replace(
    BTLM,
    name="jais",
    model_types=("jais",),
    architecture="JAISLMHeadModel",
)
