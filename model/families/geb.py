"""GEB-1.3B and the models whose layout its config.json follows, ChatGLM 2 and 3.

Rotary embeddings turn neighbouring channels of the first half of each head. The names of GEB's own
tensors are not known to us; a checkpoint that has others than ChatGLM's is refused, with the names.
"""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import FamilyError, Keys, Values, always, key, unread
from model.families.tensors import contiguous, linear, norm, table


def vocabulary() -> Keys:
    """`padded_vocab_size`, and `vocab_size` where it stands beside it."""

    def read(values: Values) -> dict[str, Any]:
        size = values.get("padded_vocab_size", 65024)
        if values.get("vocab_size", size) != size:
            raise FamilyError(f"vocab_size is {values['vocab_size']}, padded_vocab_size {size}")
        return {"vocab_size": size}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"padded_vocab_size": config.vocab_size, "vocab_size": config.vocab_size}

    return Keys(("padded_vocab_size", "vocab_size"), read, write)


def heads() -> Keys:
    """`kv_channels`, half of which rotate, and the key heads, called groups."""

    def read(values: Values) -> dict[str, Any]:
        groups = values.get("multi_query_group_num")
        grouped = values.get("multi_query_attention", groups is not None)
        width = values.get("kv_channels", 128)
        return {
            "head_dim": width,
            "rotary_dim": width // 2,
            "kv_heads": (1 if groups is None else groups) if grouped else None,
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        return {
            "kv_channels": config.head_dim,
            "multi_query_attention": config.kv_heads != config.num_heads,
            "multi_query_group_num": config.kv_heads,
        }

    return Keys(("kv_channels", "multi_query_attention", "multi_query_group_num"), read, write)


LAYER = "transformer.encoder.layers.{layer}"

GEB = Family(
    name="geb",
    model_types=("chatglm", "geb"),
    architecture="ChatGLMModel",
    fixed={"rotary_layout": "interleaved"},
    keys=(
        vocabulary(),
        heads(),
        key("hidden_size", "d_model", 4096),
        key("ffn_hidden_size", "d_ff", 13696),
        key("num_layers", "num_layers", 28),
        key("num_attention_heads", "num_heads", 32),
        key("seq_length", "max_length", 2048),
        key("layernorm_epsilon", "norm_eps", 1e-5),
        key("add_qkv_bias", "qkv_bias", False),
        key("post_layer_norm", "final_norm", True),
        key("tie_word_embeddings", "tied_embeddings", False),
        always("rmsnorm", True),
        always("add_bias_linear", False),
        always("apply_residual_connection_post_layernorm", False),
        always("original_rope", True),
        always("rope_ratio", 1, written=False),
        always("quantization_bit", 0, 0, None, written=False),
        always("pre_seq_len", None, written=False),
        unread("apply_query_key_layer_scaling", "attention_softmax_in_fp32"),
        unread("bias_dropout_fusion", "fp32_residual_connection", "prefix_projection"),
    ),
    tensors=(
        *table("transformer.embedding.word_embeddings", "embed"),
        *norm(f"{LAYER}.input_layernorm", "layers/attention_norm"),
        *linear(
            f"{LAYER}.self_attention.query_key_value",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            packing=contiguous,
        ),
        *linear(f"{LAYER}.self_attention.dense", "layers/attention/output"),
        *norm(f"{LAYER}.post_attention_layernorm", "layers/feed_forward_norm"),
        *linear(
            f"{LAYER}.mlp.dense_h_to_4h",
            "layers/feed_forward/gate",
            "layers/feed_forward/up",
            packing=contiguous,
        ),
        *linear(f"{LAYER}.mlp.dense_4h_to_h", "layers/feed_forward/down"),
        *norm("transformer.encoder.final_layernorm", "final_norm"),
        *linear("transformer.output_layer", "head"),
    ),
    prefix="transformer.",
    buffers=(r".*rotary_pos_emb\.inv_freq",),
)
