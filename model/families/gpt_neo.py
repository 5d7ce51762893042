"""GPT-Neo: unscaled attention whose layers see all tokens or a window of them, by turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.gpt2 import feed_forward_width
from model.families.keys import FamilyError, Keys, Values, activation, key
from model.families.rope import plain_length
from model.families.tensors import linear, norm, table

WIDTH = key("hidden_size", "d_model", 2048)
LAYERS = key("num_layers", "num_layers", 24, also=("num_hidden_layers",))
WINDOW = 256
"""`window_size` where it is absent."""


def attention_types() -> Keys:
    """`attention_types`, `[[["global", "local"], 12]]`, and `window_size` as windows of layers."""

    def read(values: Values) -> dict[str, Any]:
        kinds, window = _kinds(values), values.get("window_size", WINDOW)
        if set(kinds) == {"local"}:
            return {"sliding_window": window}
        overrides = ((layer, "sliding_window", window) for layer in _of(kinds, "local"))
        return {"layer_overrides": tuple(overrides)}

    def write(config: ModelConfig) -> dict[str, Any]:
        windows = [config.layer(layer).sliding_window for layer in range(config.num_layers)]
        kinds = ["local" if window else "global" for window in windows]
        found = next((window for window in windows if window), WINDOW)
        return {"attention_types": _grouped(kinds), "window_size": found}

    return Keys(("attention_types", "attention_layers", "window_size"), read, write)


def _kinds(values: Values) -> list[str]:
    """The kind of each layer; `attention_layers` must say the same where it is there."""
    groups = values.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for pattern, times in groups for _ in range(times) for kind in pattern]
    listed = values.get("attention_layers") or kinds
    layers = LAYERS.read(values)["num_layers"]
    unknown = sorted(set(kinds) - {"global", "local"})
    if unknown:
        raise FamilyError(f"attention_types has {unknown[0]!r}; known: global, local")
    if len(kinds) != layers:
        raise FamilyError(f"attention_types is for {len(kinds)} layers, num_layers is {layers}")
    if list(listed) != kinds:
        raise FamilyError(f"attention_layers is {listed!r}, attention_types says {kinds!r}")
    return kinds


def _of(kinds: Sequence[str], wanted: str) -> list[int]:
    return [layer for layer, kind in enumerate(kinds) if kind == wanted]


def _grouped(kinds: list[str]) -> list[list[Any]]:
    """`[[shortest pattern, times]]`."""
    count = len(kinds)
    sizes = (n for n in range(1, count + 1) if kinds == kinds[:n] * (count // n))
    size = next(sizes)
    return [[kinds[:size], count // size]]


GPT_NEO = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    architecture="GPTNeoForCausalLM",
    fixed={
        "feed_forward": "plain",
        "feed_forward_bias": True,
        "norm": "layernorm",
        "positions": "learned",
        "output_bias": True,
        "attention_scale": 1.0,
    },
    keys=(
        key("vocab_size", "vocab_size", 50257),
        plain_length(2048),
        WIDTH,
        LAYERS,
        key("num_heads", "num_heads", 16, also=("num_attention_heads",)),
        feed_forward_width("intermediate_size", WIDTH),
        attention_types(),
        key("layer_norm_epsilon", "norm_eps", 1e-5),
        key("initializer_range", "init_std", 0.02),
        activation("activation_function", "gelu_new"),
        key("tie_word_embeddings", "tied_embeddings", True),
    ),
    tensors=(
        *table("transformer.wte", "embed"),
        *table("transformer.wpe", "positions"),
        *norm("transformer.h.{layer}.ln_1", "layers/attention_norm"),
        *linear("transformer.h.{layer}.attn.attention.q_proj", "layers/attention/query"),
        *linear("transformer.h.{layer}.attn.attention.k_proj", "layers/attention/key"),
        *linear("transformer.h.{layer}.attn.attention.v_proj", "layers/attention/value"),
        *linear("transformer.h.{layer}.attn.attention.out_proj", "layers/attention/output"),
        *norm("transformer.h.{layer}.ln_2", "layers/feed_forward_norm"),
        *linear("transformer.h.{layer}.mlp.c_fc", "layers/feed_forward/up"),
        *linear("transformer.h.{layer}.mlp.c_proj", "layers/feed_forward/down"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
    prefix="transformer.",
    buffers=(r".*\.attn\.attention\.(masked_)?bias",),
)
