"""Baichuan 2: Llama with one matrix for queries, keys and values, and a head whose rows are
divided by their lengths.

The 7B rotates queries and keys, the 13B has ALiBi; their files say it by `max_position_embeddings`,
which the 13B lacks. The first Baichuan, whose head is plain, has the same tensors and is told by
its smaller vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from model.families.keys import FamilyError, Keys, Values, activation, key, unread, without
from model.families.llama import FEED_FORWARD, LLAMA, NORMS, OUTER, sizes
from model.families.tensors import contiguous, linear

FIRST_VOCABULARY = 64000
"""Tokens of the first generation."""


def generation() -> Keys:
    """The vocabulary, which says the generation and so the kind of head."""
    size = key("vocab_size", "vocab_size", 125696)

    def read(values: Values) -> dict[str, Any]:
        fields = size.read(values)
        first = values.get("architectures") == ["BaiChuanForCausalLM"]
        if first or fields["vocab_size"] == FIRST_VOCABULARY:
            raise FamilyError(
                f"vocab_size is {fields['vocab_size']}, architectures "
                f"{values.get('architectures')}: that is the first Baichuan, whose head is plain; "
                "only Baichuan 2 is read"
            )
        return fields

    return Keys(size.names, read, size.write)


def positions() -> Keys:
    """`max_position_embeddings` of the 7B (RoPE), or only `model_max_length` of the 13B (ALiBi)."""

    def read(values: Values) -> dict[str, Any]:
        length = values.get("max_position_embeddings")
        if length is None and "model_max_length" in values:
            return {"positions": "alibi", "max_length": values["model_max_length"]}
        return {"positions": "rope", "max_length": 4096 if length is None else length}

    def write(config: ModelConfig) -> dict[str, Any]:
        lengths = {"model_max_length": config.max_length}
        if config.positions == "rope":
            lengths["max_position_embeddings"] = config.max_length
        return lengths

    return Keys(("max_position_embeddings", "model_max_length"), read, write)


BAICHUAN = dataclasses.replace(
    LLAMA,
    name="baichuan",
    model_types=("baichuan",),
    architecture="BaichuanForCausalLM",
    fixed={"head_norm": "row_normalised"},
    keys=(
        generation(),
        *without(sizes(), "vocab_size", "num_key_value_heads", "head_dim"),
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("tie_word_embeddings", "tied_embeddings", False),
        activation("hidden_act", "silu"),
        positions(),
        unread("z_loss_weight", "_from_model_config"),
    ),
    tensors=(
        *linear(
            "model.layers.{layer}.self_attn.W_pack",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            packing=contiguous,
        ),
        *linear("model.layers.{layer}.self_attn.o_proj", "layers/attention/output"),
        *FEED_FORWARD,
        *NORMS,
        *OUTER,
    ),
)
