"""Gemma 1 and 2: embeddings times sqrt(d_model), norms stored minus one, a tied head.

Gemma 2 adds norms after attention and feed-forward, soft caps, and a window in every second layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import ACTIVATION_NAMES, Keys, Values, always, key, unread
from model.families.llama import ATTENTION, FEED_FORWARD, LLAMA, OUTER, sizes
from model.families.rope import attention_scale_from, plain_length, rope
from model.families.tensors import Tensor, norm
from model.families.windows import FULL, SLIDING, sliding_layers

WINDOW = 4096
"""The default of `sliding_window`."""

TANH_FIRST = {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATION_NAMES}
"""Activations, the tanh approximation written as Gemma's files do."""

SANDWICH_NORMS: tuple[Tensor, ...] = (
    *norm("model.layers.{layer}.input_layernorm", "layers/attention_norm"),
    *norm("model.layers.{layer}.post_attention_layernorm", "layers/attention_output_norm"),
    *norm("model.layers.{layer}.pre_feedforward_layernorm", "layers/feed_forward_norm"),
    *norm("model.layers.{layer}.post_feedforward_layernorm", "layers/feed_forward_output_norm"),
)


def scaled_embeddings(default_d_model: int) -> Keys:
    """What no key says: embeddings are multiplied by sqrt(d_model)."""

    def read(values: Values) -> dict[str, Any]:
        return {"embedding_scale": math.sqrt(values.get("hidden_size", default_d_model))}

    return Keys((), read, lambda config: {})


def layer_types(pattern: int, default_layers: int) -> Keys:
    """Which layers attend within `sliding_window`: by `layer_types`, or else all but every
    `pattern`-th.
    """

    def read(values: Values) -> dict[str, Any]:
        full = [i for i, slides in enumerate(slide(values, pattern, default_layers)) if not slides]
        return {
            "sliding_window": values.get("sliding_window", WINDOW),
            "layer_overrides": tuple((layer, "sliding_window", None) for layer in full),
        }

    return Keys(("sliding_window", "layer_types"), read, window_to_hf)


def slide(values: Values, pattern: int, default_layers: int) -> list[bool]:
    """For each layer, whether it attends within the window."""
    layers = values.get("num_hidden_layers", default_layers)
    if values.get("layer_types") is not None:
        return sliding_layers(values["layer_types"], layers)
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types`; windows of several widths fail when they are compared."""
    widths = [config.layer(layer).sliding_window for layer in range(config.num_layers)]
    return {
        "sliding_window": next((width for width in widths if width is not None), WINDOW),
        "layer_types": [FULL if width is None else SLIDING for width in widths],
    }


def common(d_model: int, max_length: int) -> tuple[Keys, ...]:
    """The keys that all Gemmas share, but for sizes, activation and windows."""
    return (
        scaled_embeddings(d_model),
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("tie_word_embeddings", "tied_embeddings", True),
        key("attention_bias", "qkv_bias", False),
        key("attention_bias", "output_bias", False),
        plain_length(max_length),
        always("use_bidirectional_attention", False, False, None),
        unread("cache_implementation"),
    )


GEMMA = dataclasses.replace(
    LLAMA,
    name="gemma",
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    fixed={"norm": "rmsnorm_plus_one"},
    keys=(
        *sizes(256000, 3072, 24576, 28, 16, 16, 256),
        *common(3072, 8192),
        # the first files say "gelu" and mean its approximation
        key(
            "hidden_act",
            "activation",
            "gelu_pytorch_tanh",
            names=TANH_FIRST | {"gelu": "gelu_tanh"},
        ),
        always("hidden_activation", None, None, "gelu_pytorch_tanh", written=False),
        rope(10000.0, default_max_length=8192),
    ),
)

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    fixed={"norm": "rmsnorm_plus_one", "norm_position": "sandwich"},
    keys=(
        *sizes(256000, 2304, 9216, 26, 8, 4, 256),
        *common(2304, 8192),
        key("hidden_activation", "activation", "gelu_pytorch_tanh", names=TANH_FIRST),
        unread("hidden_act", "sliding_window_size"),
        rope(10000.0, default_max_length=8192),
        attention_scale_from("query_pre_attn_scalar", 256),
        key("attn_logit_softcapping", "attention_soft_cap", 50.0),
        key("final_logit_softcapping", "logit_soft_cap", 30.0),
        layer_types(2, 26),
    ),
    tensors=(*ATTENTION, *FEED_FORWARD, *SANDWICH_NORMS, *OUTER),
    buffers=LLAMA.buffers,
)
