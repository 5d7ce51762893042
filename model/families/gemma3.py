"""Gemma 3: Gemma 2 with a norm on queries and keys, and a rotary embedding of their own for the
layers that attend within a window.

Most published checkpoints also hold a vision tower (`model_type` "gemma3"). Their text part is read
as the model that it is, and written as one without images.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig, RopeScaling
from model.families.family import fields_from_hf
from model.families.gemma import GEMMA2, TANH_FIRST, common, slide, window_to_hf
from model.families.keys import FamilyError, Keys, Values, always, key, unread
from model.families.llama import sizes
from model.families.qwen3 import QK_NORMS
from model.families.rope import attention_scale_from, scaling, scaling_to_hf
from model.families.windows import FULL, SLIDING

LAYERS, MAX_LENGTH = 26, 131072
"""Defaults of `num_hidden_layers` and `max_position_embeddings`."""

BASES = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}
"""Kind of layers -> the old key of its rotary base, and the default."""

Rotary = tuple[float, RopeScaling | None]


def _layers_from_hf(values: Values) -> dict[str, Any]:
    """Window and rotary embedding of the sliding layers as the model's, of the others as
    overrides.
    """
    pattern = values.get("sliding_window_pattern") or 6
    full = [i for i, slides in enumerate(slide(values, pattern, LAYERS)) if not slides]
    local, everywhere = _rotary(values, SLIDING), _rotary(values, FULL)
    changes: dict[str, Any] = {"sliding_window": None}
    if everywhere[0] != local[0]:
        changes["rope_base"] = everywhere[0]
    if everywhere[1] != local[1]:
        changes["rope_scaling"] = everywhere[1]
    return {
        "sliding_window": values.get("sliding_window", 4096),
        "rope_base": local[0],
        "rope_scaling": local[1],
        "layer_overrides": tuple((layer, *change) for layer in full for change in changes.items()),
    }


def _rotary(values: Values, kind: str) -> Rotary:
    """Base and scaling of one kind of layers, in the old spelling or the new."""
    nested = values.get("rope_parameters") or {}
    unknown = sorted(set(nested) - {FULL, SLIDING})
    if unknown:
        raise FamilyError(f"rope_parameters has {unknown[0]!r}; known: {FULL}, {SLIDING}")
    old = (values.get("rope_scaling") or {}) if kind == FULL else {}
    given = {**(nested.get(kind) or {}), **old}
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise FamilyError(
            f"{kind}: partial_rotary_factor is {given['partial_rotary_factor']}, not 1"
        )
    name, default = BASES[kind]
    base = given.get("rope_theta", values.get(name, default))
    return float(base), scaling(given, values.get("max_position_embeddings", MAX_LENGTH))


def _layers_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The old spelling, which all versions of transformers read."""
    layers = [config.layer(layer) for layer in range(config.num_layers)]
    full = next((layer for layer in layers if layer.sliding_window is None), None)
    local = next((layer for layer in layers if layer.sliding_window is not None), None)
    return {
        **window_to_hf(config),
        "rope_theta": BASES[FULL][1] if full is None else full.rope_base,
        "rope_local_base_freq": BASES[SLIDING][1] if local is None else local.rope_base,
        "rope_scaling": None if full is None else scaling_to_hf(full.rope_scaling),
    }


LAYER_KEYS = Keys(
    (
        "sliding_window",
        "sliding_window_pattern",
        "layer_types",
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "rope_parameters",
    ),
    _layers_from_hf,
    _layers_to_hf,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    fixed={**GEMMA2.fixed, "qk_norm": "head"},
    keys=(
        *sizes(262208, 2304, 9216, LAYERS, 8, 4, 256),
        *common(2304, MAX_LENGTH),
        key("hidden_activation", "activation", "gelu_pytorch_tanh", names=TANH_FIRST),
        attention_scale_from("query_pre_attn_scalar", 256),
        always("attn_logit_softcapping", None),
        key("final_logit_softcapping", "logit_soft_cap", None),
        unread("hidden_act", "_sliding_window_pattern"),
        LAYER_KEYS,
    ),
    tensors=(*GEMMA2.tensors, *QK_NORMS),
)


def _text_from_hf(values: Values) -> dict[str, Any]:
    return fields_from_hf(GEMMA3, values.get("text_config") or {})


def _refuse(config: ModelConfig) -> dict[str, Any]:
    raise FamilyError("a text model is written as gemma3; gemma3_images is only read")


GEMMA3_IMAGES = dataclasses.replace(
    GEMMA3,
    name="gemma3_images",
    model_types=("gemma3",),
    architecture="Gemma3ForConditionalGeneration",
    fixed={},
    keys=(
        Keys(("text_config",), _text_from_hf, _refuse),
        always("tie_word_embeddings", True),
        unread("vision_config", "mm_tokens_per_image", "initializer_range"),
        unread("image_token_index", "boi_token_index", "eoi_token_index"),
    ),
    tensors=tuple(
        dataclasses.replace(tensor, theirs=f"language_model.{tensor.theirs}")
        for tensor in GEMMA3.tensors
    ),
    prefix="language_model.model.",
    buffers=(*GEMMA3.buffers, r"(vision_tower|multi_modal_projector)\..*"),
    written_as="gemma3",
)
