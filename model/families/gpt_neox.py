"""GPT-NeoX, Pythia, Dolly, RedPajama-INCITE: queries, keys and values packed head by head, and
RoPE on the first channels of a head.
"""

from __future__ import annotations

from model.families.family import Family
from model.families.keys import activation, key
from model.families.rope import plain_length, rope
from model.families.tensors import by_kv_head, linear, norm, table

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    fixed={"feed_forward": "plain", "feed_forward_bias": True, "norm": "layernorm"},
    keys=(
        key("vocab_size", "vocab_size", 50432),
        key("hidden_size", "d_model", 6144),
        key("intermediate_size", "d_ff", 24576),
        key("num_hidden_layers", "num_layers", 44),
        key("num_attention_heads", "num_heads", 64),
        plain_length(2048),
        key("layer_norm_eps", "norm_eps", 1e-5),
        key("initializer_range", "init_std", 0.02),
        activation("hidden_act", "gelu"),
        key("tie_word_embeddings", "tied_embeddings", False),
        key("attention_bias", "qkv_bias", True),
        key("attention_bias", "output_bias", True),
        key(
            "use_parallel_residual",
            "residual",
            True,
            names={True: "parallel_two_norms", False: "sequential"},
        ),
        rope(
            partial=0.25,
            default_sizes=(6144, 64),
            base_name="rotary_emb_base",
            partial_name="rotary_pct",
        ),
    ),
    tensors=(
        *table("gpt_neox.embed_in", "embed"),
        *norm("gpt_neox.layers.{layer}.input_layernorm", "layers/attention_norm"),
        *linear(
            "gpt_neox.layers.{layer}.attention.query_key_value",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            packing=by_kv_head,
        ),
        *linear("gpt_neox.layers.{layer}.attention.dense", "layers/attention/output"),
        *norm("gpt_neox.layers.{layer}.post_attention_layernorm", "layers/feed_forward_norm"),
        *linear("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "layers/feed_forward/up"),
        *linear("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "layers/feed_forward/down"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *linear("embed_out", "head"),
    ),
    prefix="gpt_neox.",
    buffers=(r".*\.attention\.(masked_)?bias", r".*rotary_emb\.inv_freq"),
)
