"""Mixtral: Mistral whose feed-forwards are mixtures of experts."""

from __future__ import annotations

import dataclasses

from model.families.keys import Keys, activation, key
from model.families.llama import ATTENTION, NORMS, OUTER, sizes
from model.families.mistral import MISTRAL, NO_BIASES
from model.families.rope import plain_length, rope
from model.families.tensors import Tensor, linear

MOE = "model.layers.{layer}.block_sparse_moe"


def expert_width(theirs: str, default: int, also: tuple[str, ...] = ()) -> tuple[Keys, ...]:
    """The key of the experts' width in a family where all layers are mixtures."""
    return (key(theirs, "d_ff", default, also=also), key(theirs, "expert_d_ff", default, also=also))


EXPERTS: tuple[Tensor, ...] = (
    *linear(f"{MOE}.gate", "layers/feed_forward/router"),
    *linear(f"{MOE}.experts.{{expert}}.w1", "layers/feed_forward/experts/gate"),
    *linear(f"{MOE}.experts.{{expert}}.w3", "layers/feed_forward/experts/up"),
    *linear(f"{MOE}.experts.{{expert}}.w2", "layers/feed_forward/experts/down"),
)

MIXTRAL = dataclasses.replace(
    MISTRAL,
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    fixed={"feed_forward": "experts", "router_renormalise": True},
    keys=(
        *sizes(kv_heads=8),
        *expert_width("intermediate_size", 14336),
        key("num_local_experts", "num_experts", 8, also=("num_experts",)),
        key("num_experts_per_tok", "experts_per_token", 2),
        key("rms_norm_eps", "norm_eps", 1e-5),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(131072),
        rope(1000000.0, default_max_length=131072),
        key("sliding_window", "sliding_window", None),
        *NO_BIASES,
    ),
    tensors=(*ATTENTION, *EXPERTS, *NORMS, *OUTER),
)
