"""OPT and Galactica: learned positions from 2 on, ReLU, and in OPT-350m norms after the sum and a
narrow token table.
"""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import Keys, Values, activation, always, key
from model.families.rope import plain_length
from model.families.tensors import linear, norm, table

WIDTH = key("hidden_size", "d_model", 768)


def norms() -> Keys:
    """Where the norms stand, and whether there is a last one (`_remove_final_layer_norm`: OPTs
    fine-tuned before July 2022).
    """

    def read(values: Values) -> dict[str, Any]:
        before = values.get("do_layer_norm_before", True)
        return {
            "norm_position": "pre" if before else "post",
            "final_norm": bool(before and not values.get("_remove_final_layer_norm", False)),
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        before = config.norm_position == "pre"
        return {
            "do_layer_norm_before": before,
            "_remove_final_layer_norm": before and not config.final_norm,
        }

    return Keys(("do_layer_norm_before", "_remove_final_layer_norm"), read, write)


def token_width() -> Keys:
    """`word_embed_proj_dim`, the width of the token table; that of the model where it is absent."""

    def read(values: Values) -> dict[str, Any]:
        width = values.get("word_embed_proj_dim")
        return {"d_embed": None if width == WIDTH.read(values)["d_model"] else width}

    return Keys(
        ("word_embed_proj_dim",),
        read,
        lambda config: {"word_embed_proj_dim": config.d_embed or config.d_model},
    )


OPT = Family(
    name="opt",
    model_types=("opt",),
    architecture="OPTForCausalLM",
    fixed={
        "feed_forward": "plain",
        "norm_eps": 1e-5,
        "positions": "learned",
        "position_offset": 2,
    },
    keys=(
        key("vocab_size", "vocab_size", 50272),
        WIDTH,
        key("num_hidden_layers", "num_layers", 12),
        key("num_attention_heads", "num_heads", 12),
        key("ffn_dim", "d_ff", 3072),
        plain_length(2048),
        key("init_std", "init_std", 0.02),
        activation("activation_function", "relu"),
        key("tie_word_embeddings", "tied_embeddings", True),
        key("enable_bias", "qkv_bias", True),
        key("enable_bias", "output_bias", True),
        key("enable_bias", "feed_forward_bias", True),
        key(
            "layer_norm_elementwise_affine",
            "norm",
            True,
            names={True: "layernorm", False: "layernorm_noaffine"},
        ),
        norms(),
        token_width(),
        always("learned_embeddings", True, written=False),
        always("scale_embeddings", False, written=False),
    ),
    tensors=(
        *table("model.decoder.embed_tokens", "embed"),
        *linear("model.decoder.project_in", "embed_projection"),
        *table("model.decoder.embed_positions", "positions"),
        *norm("model.decoder.layers.{layer}.self_attn_layer_norm", "layers/attention_norm"),
        *linear("model.decoder.layers.{layer}.self_attn.q_proj", "layers/attention/query"),
        *linear("model.decoder.layers.{layer}.self_attn.k_proj", "layers/attention/key"),
        *linear("model.decoder.layers.{layer}.self_attn.v_proj", "layers/attention/value"),
        *linear("model.decoder.layers.{layer}.self_attn.out_proj", "layers/attention/output"),
        *norm("model.decoder.layers.{layer}.final_layer_norm", "layers/feed_forward_norm"),
        *linear("model.decoder.layers.{layer}.fc1", "layers/feed_forward/up"),
        *linear("model.decoder.layers.{layer}.fc2", "layers/feed_forward/down"),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        *linear("model.decoder.project_out", "head_projection"),
        *linear("lm_head", "head"),
    ),
)
