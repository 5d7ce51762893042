"""GPT-J: one norm for attention and feed-forward, side by side, and interleaved partial RoPE."""

from __future__ import annotations

from model.families.family import Family
from model.families.gpt2 import feed_forward_width
from model.families.keys import activation, always, key
from model.families.tensors import linear, norm, table

WIDTH = key("n_embd", "d_model", 4096, also=("hidden_size",))

GPTJ = Family(
    name="gptj",
    model_types=("gptj",),
    architecture="GPTJForCausalLM",
    fixed={
        "feed_forward": "plain",
        "feed_forward_bias": True,
        "norm": "layernorm",
        "residual": "parallel_one_norm",
        "rotary_layout": "interleaved",
        "head_bias": True,
    },
    keys=(
        key("vocab_size", "vocab_size", 50400),
        key("n_positions", "max_length", 2048, also=("max_position_embeddings",)),
        WIDTH,
        key("n_layer", "num_layers", 28, also=("num_hidden_layers",)),
        key("n_head", "num_heads", 16, also=("num_attention_heads",)),
        feed_forward_width("n_inner", WIDTH),
        key("rotary_dim", "rotary_dim", 64),
        key("layer_norm_epsilon", "norm_eps", 1e-5),
        key("initializer_range", "init_std", 0.02),
        activation("activation_function", "gelu_new"),
        always("tie_word_embeddings", False),
        always("rotary", True, written=False),
        always("scale_attn_weights", True, written=False),
    ),
    tensors=(
        *table("transformer.wte", "embed"),
        *norm("transformer.h.{layer}.ln_1", "layers/attention_norm"),
        *linear("transformer.h.{layer}.attn.q_proj", "layers/attention/query"),
        *linear("transformer.h.{layer}.attn.k_proj", "layers/attention/key"),
        *linear("transformer.h.{layer}.attn.v_proj", "layers/attention/value"),
        *linear("transformer.h.{layer}.attn.out_proj", "layers/attention/output"),
        *linear("transformer.h.{layer}.mlp.fc_in", "layers/feed_forward/up"),
        *linear("transformer.h.{layer}.mlp.fc_out", "layers/feed_forward/down"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
    prefix="transformer.",
    buffers=(r"(.*\.)?attn\.(masked_)?bias",),
)
