"""BLOOM: ALiBi, a norm after the embedding, queries, keys and values packed head by head."""

from __future__ import annotations

from typing import Any

from model.families.family import Family
from model.families.keys import FamilyError, Keys, Values, key, unread
from model.families.tensors import by_kv_head, linear, norm, table

WIDTH = key("hidden_size", "d_model", 64, also=("n_embed",))


def feed_forward_width() -> Keys:
    """`n_inner`, which the library never reads: a feed-forward is four times the model's width."""

    def read(values: Values) -> dict[str, Any]:
        width = 4 * WIDTH.read(values)["d_model"]
        if values.get("n_inner") not in (None, width):
            raise FamilyError(f"n_inner is {values['n_inner']!r}; only {width} is supported")
        return {"d_ff": width}

    return Keys(("n_inner",), read, lambda config: {})


BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    architecture="BloomForCausalLM",
    fixed={
        "activation": "gelu_tanh",
        "feed_forward": "plain",
        "feed_forward_bias": True,
        "norm": "layernorm",
        "positions": "alibi",
        "qkv_bias": True,
        "output_bias": True,
        "embed_norm": True,
    },
    keys=(
        key("vocab_size", "vocab_size", 250880),
        WIDTH,
        key("n_layer", "num_layers", 2, also=("num_hidden_layers",)),
        key("n_head", "num_heads", 8, also=("num_attention_heads",)),
        feed_forward_width(),
        key("seq_length", "max_length", 2048),
        key("layer_norm_epsilon", "norm_eps", 1e-5),
        key("initializer_range", "init_std", 0.02),
        key("tie_word_embeddings", "tied_embeddings", True),
        key(
            "apply_residual_connection_post_layernorm",
            "residual",
            False,
            names={False: "sequential", True: "sequential_normed"},
        ),
        unread(
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "offset_alibi",
            "skip_bias_add",
            "skip_bias_add_qkv",
        ),
    ),
    tensors=(
        *table("transformer.word_embeddings", "embed"),
        *norm("transformer.word_embeddings_layernorm", "embed_norm"),
        *norm("transformer.h.{layer}.input_layernorm", "layers/attention_norm"),
        *linear(
            "transformer.h.{layer}.self_attention.query_key_value",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            packing=by_kv_head,
        ),
        *linear("transformer.h.{layer}.self_attention.dense", "layers/attention/output"),
        *norm("transformer.h.{layer}.post_attention_layernorm", "layers/feed_forward_norm"),
        *linear("transformer.h.{layer}.mlp.dense_h_to_4h", "layers/feed_forward/up"),
        *linear("transformer.h.{layer}.mlp.dense_4h_to_h", "layers/feed_forward/down"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
    prefix="transformer.",
)
