"""JetMoE (arXiv 2404.07413): mixtures of attention heads and of feed-forwards.

The norms of the blocks have the epsilon of their class, 1e-6, whatever `rms_norm_eps` says: that is
the last norm's, in the authors' code and in transformers.
"""

from __future__ import annotations

from typing import Any

from model.families.family import Family
from model.families.keys import FamilyError, Keys, Values, activation, always, key, unread
from model.families.llama import NORMS, OUTER
from model.families.mixtral import expert_width
from model.families.rope import rope
from model.families.tensors import Tensor, contiguous, linear

BLOCK_NORM_EPS = 1e-6
LAYER = "model.layers.{layer}"


def _read_heads(values: Values) -> dict[str, Any]:
    k = values.get("num_experts_per_tok", values.get("moe_top_k", 2))
    heads = values.get("num_key_value_heads", 16) * k
    if values.get("num_attention_heads", heads) != heads:
        raise FamilyError(
            f"num_attention_heads is {values['num_attention_heads']}; num_key_value_heads * "
            f"num_experts_per_tok makes {heads}"
        )
    return {"num_heads": heads}


HEADS = Keys(
    ("num_attention_heads",),
    _read_heads,
    lambda config: {"num_attention_heads": config.num_heads},
)
"""Each of a token's experts has one query head for each key head."""


OLD: tuple[Keys, ...] = (
    always("glu", True, written=False),
    always("bias", True, written=False),
    always("rotary_percent", 1.0, written=False),
    unread("layer_norm_epsilon", "n_head"),
)
"""Keys of the authors' files; their code reads the first two only."""

ATTENTION: tuple[Tensor, ...] = (
    *linear(f"{LAYER}.self_attention.experts.router.layer", "layers/attention/router"),
    *linear(f"{LAYER}.self_attention.experts.input_linear", "layers/attention/experts/query"),
    *linear(f"{LAYER}.self_attention.experts.output_linear", "layers/attention/experts/output"),
    Tensor(f"{LAYER}.self_attention.experts.bias", ("layers/attention/bias",)),
    *linear(
        f"{LAYER}.self_attention.kv_proj",
        "layers/attention/key",
        "layers/attention/value",
        packing=contiguous,
    ),
)
FEED_FORWARD: tuple[Tensor, ...] = (
    *linear(f"{LAYER}.mlp.router.layer", "layers/feed_forward/router"),
    *linear(
        f"{LAYER}.mlp.input_linear",
        "layers/feed_forward/experts/gate",
        "layers/feed_forward/experts/up",
        packing=contiguous,
    ),
    *linear(f"{LAYER}.mlp.output_linear", "layers/feed_forward/experts/down"),
    Tensor(f"{LAYER}.mlp.bias", ("layers/feed_forward/bias",)),
)

JETMOE = Family(
    name="jetmoe",
    model_types=("jetmoe",),
    architecture="JetMoeForCausalLM",
    fixed={
        "mixer": "attention_experts",
        "feed_forward": "experts",
        "router_renormalise": True,
        "expert_bias": True,
        "norm_eps": BLOCK_NORM_EPS,
    },
    keys=(
        key("vocab_size", "vocab_size", 32000),
        key("hidden_size", "d_model", 2048, also=("n_embd",)),
        key("num_hidden_layers", "num_layers", 12, also=("num_layers", "n_layer")),
        key("num_key_value_heads", "kv_heads", 16),
        key("kv_channels", "head_dim", 128, also=("head_dim",)),
        HEADS,
        *expert_width("intermediate_size", 5632, also=("ffn_hidden_size",)),
        key("num_local_experts", "num_experts", 8, also=("moe_num_experts",)),
        key("num_experts_per_tok", "experts_per_token", 2, also=("moe_top_k",)),
        key("rms_norm_eps", "final_norm_eps", 1e-6),
        key("tie_word_embeddings", "tied_embeddings", True),
        key("initializer_range", "init_std", 0.01),
        activation("activation_function", "silu"),
        key("max_position_embeddings", "max_length", 4096, also=("n_positions",)),
        rope(10000.0, default_max_length=4096),
        *OLD,
    ),
    tensors=(*ATTENTION, *FEED_FORWARD, *NORMS, *OUTER),
)
