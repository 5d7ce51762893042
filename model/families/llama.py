"""Llama 1, 2, 3 and all that is stored like them (TinyLlama, Amber, K2, SmolLM)."""

from __future__ import annotations

from model.families.family import Family
from model.families.keys import Keys, activation, key
from model.families.rope import plain_length, rope
from model.families.tensors import Tensor, linear, norm, table


def sizes(
    vocab_size: int = 32000,
    d_model: int = 4096,
    d_ff: int = 11008,
    num_layers: int = 32,
    num_heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> tuple[Keys, ...]:
    """What nearly every config.json of a decoder says; the arguments are the values of absent
    keys, by default Llama's.
    """
    return (
        key("vocab_size", "vocab_size", vocab_size),
        key("hidden_size", "d_model", d_model),
        key("intermediate_size", "d_ff", d_ff),
        key("num_hidden_layers", "num_layers", num_layers),
        key("num_attention_heads", "num_heads", num_heads),
        key("num_key_value_heads", "kv_heads", kv_heads),
        key("head_dim", "head_dim", head_dim),
        key("initializer_range", "init_std", 0.02),
    )


SIZES: tuple[Keys, ...] = sizes()
"""The sizes of Llama."""

KEYS: tuple[Keys, ...] = (
    *SIZES,
    key("rms_norm_eps", "norm_eps", 1e-6),
    key("tie_word_embeddings", "tied_embeddings", False),
    activation("hidden_act", "silu"),
    plain_length(2048),
)

ATTENTION: tuple[Tensor, ...] = (
    *linear("model.layers.{layer}.self_attn.q_proj", "layers/attention/query"),
    *linear("model.layers.{layer}.self_attn.k_proj", "layers/attention/key"),
    *linear("model.layers.{layer}.self_attn.v_proj", "layers/attention/value"),
    *linear("model.layers.{layer}.self_attn.o_proj", "layers/attention/output"),
)
FEED_FORWARD: tuple[Tensor, ...] = (
    *linear("model.layers.{layer}.mlp.gate_proj", "layers/feed_forward/gate"),
    *linear("model.layers.{layer}.mlp.up_proj", "layers/feed_forward/up"),
    *linear("model.layers.{layer}.mlp.down_proj", "layers/feed_forward/down"),
)
NORMS: tuple[Tensor, ...] = (
    *norm("model.layers.{layer}.input_layernorm", "layers/attention_norm"),
    *norm("model.layers.{layer}.post_attention_layernorm", "layers/feed_forward_norm"),
)
OUTER: tuple[Tensor, ...] = (
    *table("model.embed_tokens", "embed"),
    *norm("model.norm", "final_norm"),
    *linear("lm_head", "head"),
)

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    fixed={},
    keys=(
        *KEYS,
        rope(10000.0),
        key("attention_bias", "qkv_bias", False),
        key("attention_bias", "output_bias", False),
        key("mlp_bias", "feed_forward_bias", False),
    ),
    tensors=(*ATTENTION, *FEED_FORWARD, *NORMS, *OUTER),
    buffers=(r".*\.rotary_emb\.inv_freq",),
)
