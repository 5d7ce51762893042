"""StableLM: Llama with layer norms and RoPE on a quarter of each head; StableLM 2 12B adds a norm
for each head, and attention and feed-forward side by side.
"""

from __future__ import annotations

import dataclasses

from model.families.keys import activation, always, key, without
from model.families.llama import ATTENTION, FEED_FORWARD, LLAMA, NORMS, OUTER, sizes
from model.families.rope import plain_length, rope
from model.families.tensors import Tensor

HEAD_NORMS: tuple[Tensor, ...] = tuple(
    Tensor(
        f"model.layers.{{layer}}.self_attn.{theirs}_layernorm.norms.{{head}}.weight",
        (f"layers/attention/{ours}_norm/scale",),
    )
    for theirs, ours in (("q", "query"), ("k", "key"))
)

STABLELM = dataclasses.replace(
    LLAMA,
    name="stablelm",
    model_types=("stablelm",),
    architecture="StableLmForCausalLM",
    fixed={"norm": "layernorm"},
    keys=(
        *without(sizes(50304, 2560, 6912, kv_heads=32), "head_dim"),
        key("layer_norm_eps", "norm_eps", 1e-5, also=("norm_eps",)),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        plain_length(4096),
        rope(10000.0, default_max_length=4096, partial=0.25, default_sizes=(2560, 32)),
        key("use_qkv_bias", "qkv_bias", False),
        key("qk_layernorm", "qk_norm", False, names={False: "none", True: "each_head"}),
        key(
            "use_parallel_residual",
            "residual",
            False,
            names={False: "sequential", True: "parallel_one_norm"},
        ),
        always("rotary_scaling_factor", 1.0, written=False),
    ),
    tensors=(*ATTENTION, *HEAD_NORMS, *FEED_FORWARD, *NORMS, *OUTER),
)
