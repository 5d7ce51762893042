"""Falcon: 7B (one key head, attention and feed-forward side by side behind one norm), 40B and 180B
(several key heads, two norms), Falcon2-11B (several key heads, one norm) and RefinedWeb (ALiBi, one
part after the other).
"""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.gpt2 import feed_forward_width
from model.families.keys import FamilyError, Keys, Values, activation, always, key
from model.families.rope import plain_length, rope
from model.families.tensors import by_kv_head, linear, norm, table

WIDTH = key("hidden_size", "d_model", 4544, also=("n_embed",))
HEADS = key("num_attention_heads", "num_heads", 71, also=("n_head",))
LAYERS = key("num_hidden_layers", "num_layers", 32, also=("n_layer",))


def layout() -> Keys:
    """How many key heads and norms a layer has, and whether its parts stand side by side.

    Old files of 40B have `n_head_kv` and no `new_decoder_architecture`.
    """
    names = (
        "new_decoder_architecture",
        "num_kv_heads",
        "n_head_kv",
        "multi_query",
        "parallel_attn",
        "num_ln_in_parallel_attn",
    )

    def read(values: Values) -> dict[str, Any]:
        new = values.get("new_decoder_architecture", "n_head_kv" in values)
        heads = HEADS.read(values)["num_heads"]
        several = values.get("num_kv_heads") or values.get("n_head_kv") or heads
        one = 1 if values.get("multi_query", True) else heads
        parallel, norms = values.get("parallel_attn", True), _norms(values, new)
        if new and not parallel:
            raise FamilyError(
                "parallel_attn is False with new_decoder_architecture; only True is supported"
            )
        beside = "parallel_two_norms" if norms == 2 else "parallel_one_norm"
        return {
            "kv_heads": several if new else one,
            "residual": beside if parallel else "sequential",
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        two = config.residual == "parallel_two_norms"
        grouped = config.kv_heads not in (1, config.num_heads)
        parallel, new = config.residual != "sequential", two or grouped
        values = {
            "new_decoder_architecture": new,
            "num_kv_heads": config.kv_heads if new else config.num_heads,
            "multi_query": config.kv_heads == 1,
            "parallel_attn": parallel,
        }
        return {**values, "num_ln_in_parallel_attn": 1 + two} if new else values

    return Keys(names, read, write)


def _norms(values: Values, new: bool) -> int:
    found = values.get("num_ln_in_parallel_attn")
    norms = found if found is not None else 2 if new else 1
    if norms not in ((1, 2) if new else (1,)):
        allowed = "1 or 2" if new else "1 without new_decoder_architecture"
        raise FamilyError(f"num_ln_in_parallel_attn is {norms!r}; it must be {allowed}")
    return norms


def positions() -> Keys:
    """`alibi`: slopes in bfloat16 that are scaled like q . k; or rotary embeddings."""

    def read(values: Values) -> dict[str, Any]:
        if not values.get("alibi", False):
            return {"positions": "rope"}
        head_dim = WIDTH.read(values)["d_model"] // max(1, HEADS.read(values)["num_heads"])
        scale = head_dim**-0.5
        return {"positions": "alibi", "alibi_scale": scale, "alibi_dtype": "bfloat16"}

    return Keys(("alibi",), read, lambda config: {"alibi": config.positions == "alibi"})


def own_name() -> Keys:
    """Old files are called RefinedWeb and bring code of their own; all are written as Falcon."""
    names = ("model_type", "architectures", "auto_map")
    words = {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}
    return Keys(names, lambda values: {}, lambda config: words)


def _two_norms(config: ModelConfig) -> bool:
    return config.residual == "parallel_two_norms"


def _input_norm(config: ModelConfig) -> bool:
    return not _two_norms(config)


FALCON = Family(
    name="falcon",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    architecture="FalconForCausalLM",
    fixed={"feed_forward": "plain", "norm": "layernorm"},
    keys=(
        own_name(),
        key("vocab_size", "vocab_size", 65024),
        WIDTH,
        LAYERS,
        HEADS,
        layout(),
        positions(),
        feed_forward_width("ffn_hidden_size", WIDTH),
        always("ff_factor", 4, written=False),
        activation("activation", "gelu"),
        key("bias", "qkv_bias", False),
        key("bias", "output_bias", False),
        key("bias", "feed_forward_bias", False),
        key("layer_norm_epsilon", "norm_eps", 1e-5),
        key("initializer_range", "init_std", 0.02),
        key("tie_word_embeddings", "tied_embeddings", True),
        plain_length(2048),
        rope(),
        always("apply_residual_connection_post_layernorm", False, written=False),
    ),
    tensors=(
        *table("transformer.word_embeddings", "embed"),
        *norm("transformer.h.{layer}.ln_attn", "layers/attention_norm", _two_norms),
        *norm("transformer.h.{layer}.input_layernorm", "layers/attention_norm", _input_norm),
        *linear(
            "transformer.h.{layer}.self_attention.query_key_value",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            packing=by_kv_head,
        ),
        *linear("transformer.h.{layer}.self_attention.dense", "layers/attention/output"),
        *norm("transformer.h.{layer}.ln_mlp", "layers/feed_forward_norm", _two_norms),
        *norm(
            "transformer.h.{layer}.post_attention_layernorm",
            "layers/feed_forward_norm",
            _input_norm,
        ),
        *linear("transformer.h.{layer}.mlp.dense_h_to_4h", "layers/feed_forward/up"),
        *linear("transformer.h.{layer}.mlp.dense_4h_to_h", "layers/feed_forward/down"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
    prefix="transformer.",
    buffers=(r".*rotary_emb\.inv_freq",),
)
