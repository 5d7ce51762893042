"""GPT-2 and all that is stored like it (DistilGPT-2, DialoGPT, Cerebras-GPT)."""

from __future__ import annotations

import math
from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import Keys, Values, activation, key
from model.families.tensors import Tensor, contiguous, conv1d, linear, norm, table

WIDTH = key("n_embd", "d_model", 768, also=("hidden_size",))
LAYERS = key("n_layer", "num_layers", 12, also=("num_hidden_layers",))
HEADS = key("n_head", "num_heads", 12, also=("num_attention_heads",))
LENGTH = key("n_positions", "max_length", 1024, also=("max_position_embeddings",))


def feed_forward_width(theirs: str, width: Keys) -> Keys:
    """The key of the feed-forward's width; absent or null it is four times the model's `width`."""

    def read(values: Values) -> dict[str, Any]:
        return {"d_ff": values.get(theirs) or 4 * width.read(values)["d_model"]}

    return Keys((theirs,), read, lambda config: {theirs: config.d_ff})


def attention_scales(by_width: str | None = None, also: tuple[str, ...] = ()) -> Keys:
    """What q . k is divided by: the root of the head's width (`scale_attn_weights`), or the width
    itself (the key `by_width` of muP), and the layer's number counted from 1
    (`scale_attn_by_inverse_layer_idx`).
    """
    by_widths = (*([by_width] if by_width else []), *also)

    def read(values: Values) -> dict[str, Any]:
        head_dim = WIDTH.read(values)["d_model"] // max(1, HEADS.read(values)["num_heads"])
        power = 1.0 if any(values.get(name) for name in by_widths) else 0.5
        scale = head_dim**-power if values.get("scale_attn_weights", True) else 1.0
        fields: dict[str, Any] = {"attention_scale": scale}
        if values.get("scale_attn_by_inverse_layer_idx", False):
            fields["layer_overrides"] = tuple(
                (layer, "attention_scale", scale / (layer + 1))
                for layer in range(1, LAYERS.read(values)["num_layers"])
            )
        return fields

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.head_dim is not None
        first, last = (config.layer(n).attention_scale for n in (0, config.num_layers - 1))
        assert first is not None
        values: dict[str, Any] = {
            "scale_attn_weights": not math.isclose(first, 1.0),
            "scale_attn_by_inverse_layer_idx": first != last,
        }
        if by_width is not None:
            values[by_width] = math.isclose(first, 1.0 / config.head_dim)
        return values

    names = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", *by_widths)
    return Keys(names, read, write)


SIZES: tuple[Keys, ...] = (
    key("vocab_size", "vocab_size", 50257),
    LENGTH,
    WIDTH,
    LAYERS,
    HEADS,
    feed_forward_width("n_inner", WIDTH),
    key("layer_norm_epsilon", "norm_eps", 1e-5),
    key("initializer_range", "init_std", 0.02),
    key("tie_word_embeddings", "tied_embeddings", True),
)

FIXED = {
    "norm": "layernorm",
    "qkv_bias": True,
    "output_bias": True,
    "feed_forward_bias": True,
}

TENSORS: tuple[Tensor, ...] = (
    *table("transformer.wte", "embed"),
    *table("transformer.wpe", "positions"),
    *norm("transformer.h.{layer}.ln_1", "layers/attention_norm"),
    *conv1d(
        "transformer.h.{layer}.attn.c_attn",
        "layers/attention/query",
        "layers/attention/key",
        "layers/attention/value",
        packing=contiguous,
    ),
    *conv1d("transformer.h.{layer}.attn.c_proj", "layers/attention/output"),
    *norm("transformer.h.{layer}.ln_2", "layers/feed_forward_norm"),
    *conv1d("transformer.h.{layer}.mlp.c_fc", "layers/feed_forward/up"),
    *conv1d("transformer.h.{layer}.mlp.c_proj", "layers/feed_forward/down"),
    *norm("transformer.ln_f", "final_norm"),
    *linear("lm_head", "head"),
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    fixed={**FIXED, "positions": "learned", "feed_forward": "plain"},
    keys=(*SIZES, activation("activation_function", "gelu_new"), attention_scales()),
    tensors=TENSORS,
    prefix="transformer.",
    buffers=(r"(.*\.)?attn\.(masked_)?bias",),
)
