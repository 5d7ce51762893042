"""What a decoder is, as one frozen dataclass of plain values; its defaults are a small Llama.

`ModelConfig` says what is computed, never how (`model.runtime.Runtime` says that). Layers that
differ are written as `layer_overrides`; `segments` cuts the stack into runs of equal layers, each
of which is one scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from model.config_checks import check_combinations, check_name, check_overrides, check_sizes
from model.feed_forward import ACTIVATIONS
from model.feed_forwards import FEED_FORWARDS
from model.mixers import MIXERS
from model.moe.checks import check_experts
from model.norms import NORMS
from model.rope import RopeScaling

NAMES: dict[str, Iterable[str]] = {
    "mixer": MIXERS,
    "feed_forward": FEED_FORWARDS,
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "norm_position": ("pre", "post", "output", "sandwich"),
    "residual": ("sequential", "sequential_normed", "parallel_one_norm", "parallel_two_norms"),
    "positions": ("rope", "alibi", "learned", "none"),
    "rotary_layout": ("half", "interleaved"),
    "alibi_dtype": ("float32", "bfloat16", "float16"),
    "qk_norm": ("none", "head", "each_head", "full"),
    "head_norm": ("none", "row_normalised"),
}
"""Field -> the names it may hold."""

GLOBAL_FIELDS = frozenset(
    {
        "vocab_size",
        "d_model",
        "num_layers",
        "max_length",
        "d_embed",
        "tied_embeddings",
        "embed_norm",
        "head_bias",
        "head_norm",
        "final_norm",
        "final_norm_eps",
        "embedding_scale",
        "position_scale",
        "logit_scale",
        "logit_soft_cap",
        "base_d_model",
        "layer_overrides",
    }
)
"""Fields that belong to the whole decoder; all others may differ from layer to layer."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder language model; the defaults are a small Llama.

    vocab_size: number of token ids.
    d_model: width of the residual stream.
    num_layers: number of blocks.
    num_heads: number of query heads.
    kv_heads: number of key and value heads; None is num_heads.
    head_dim: width of one head; None is d_model / num_heads.
    d_ff: width of the feed-forward; None is 4 d_model, or 8/3 of it rounded up to 64 if gated.
    d_embed: width of the token table, with a projection to d_model and one back before the head
        (OPT-350m); None is d_model without projections.
    max_length: longest sequence, in tokens; a hard bound with learned positions only.
    mixer: what mixes over the length: "attention", or "attention_experts", a mixture of attention
        heads (JetMoE).
    feed_forward: "gated", "plain", or "experts", a mixture of gated ones.
    activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
    norm: "rmsnorm", "rmsnorm_plus_one" (stored minus one), "layernorm", "layernorm_nobias" or
        "layernorm_noaffine" (without scale and bias).
    norm_eps: added to the variance.
    final_norm: a norm after the last layer.
    final_norm_eps: the same as norm_eps for the last norm; None is norm_eps.
    norm_position: "pre", "post" (after the sum), "output" (of each part; OLMo 2) or "sandwich".
    residual: "sequential", "sequential_normed" (the sum starts from the normed stream; BLOOM's
        option), "parallel_one_norm" (GPT-J) or "parallel_two_norms" (GPT-NeoX).
    positions: "rope", "alibi", "learned" or "none".
    position_offset: learned: added to every position (OPT: 2).
    rotary_dim: leading channels of a head that rotate; None is all.
    rotary_layout: "half" (Llama) or "interleaved" (GPT-J).
    rope_base: base of the rotary wavelengths.
    rope_scaling: stretching of the rotary frequencies; None is none.
    alibi_scale: multiplies the ALiBi slopes (Falcon: head_dim ** -0.5).
    alibi_dtype: the slopes are rounded to it (Falcon: "bfloat16").
    attention_scale: multiplies q . k; None is head_dim ** -0.5.
    attention_soft_cap: bounds attention scores by cap * tanh(s / cap); None is none.
    sliding_window: tokens that attention sees, the own and those before it; None is all.
    qk_norm: a norm of queries and keys, of the kind `norm` but without bias: "none", over a "head"
        with one scale for all (Qwen3), with a scale for "each_head" (StableLM), or over the "full"
        row (OLMo 2).
    qkv_bias: biases on query, key and value.
    output_bias: bias on the attention output.
    feed_forward_bias: biases in the feed-forward.
    num_experts: experts of a mixture layer, of the feed-forward and of the attention heads.
    experts_per_token: experts that each token is sent to.
    expert_d_ff: width of one expert; None is d_ff.
    shared_expert_d_ff: width of an expert that takes every token beside the mixture; None is none.
    shared_expert_gate: the shared expert's output times a sigmoid of its own (Qwen2-MoE).
    router_renormalise: the gates of a token's experts sum to 1 (Mixtral, JetMoE).
    capacity_factor: an expert takes at most this times its even share of each row's tokens and
        the rest pass it by; None drops nothing, and with a cache nothing is dropped either.
    expert_bias: one bias on the output of each mixture (JetMoE).
    head_bias: bias on the logits (untied head only).
    tied_embeddings: the head multiplies by the embedding table.
    head_norm: "none", or "row_normalised": each token's row of the head is divided by its length
        (Baichuan 2).
    embed_norm: a norm right after the embedding (BLOOM).
    embedding_scale: multiplies the token embeddings (Gemma: sqrt(d_model)).
    position_scale: multiplies the learned positions (Cerebras' GPT-2 with muP).
    residual_scale: multiplies what each part adds to the residual stream (MiniCPM).
    logit_scale: multiplies the logits (muP: base_d_model / d_model).
    logit_soft_cap: bounds the logits by cap * tanh(z / cap); None is none.
    dropout: rate after the embedding and on what each part adds; acts only when an rng is given.
    init_std: standard deviation of initial weights.
    base_d_model: muP: width at which init_std and learning rate were tuned; None is no muP.
    layer_overrides: (layer, field, value) triples for layers that differ.
    """

    vocab_size: int = 32000
    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    d_embed: int | None = None
    max_length: int = 2048
    mixer: str = "attention"
    feed_forward: str = "gated"
    activation: str = "silu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    final_norm: bool = True
    final_norm_eps: float | None = None
    norm_position: str = "pre"
    residual: str = "sequential"
    positions: str = "rope"
    position_offset: int = 0
    rotary_dim: int | None = None
    rotary_layout: str = "half"
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    alibi_scale: float = 1.0
    alibi_dtype: str = "float32"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    sliding_window: int | None = None
    qk_norm: str = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    num_experts: int = 8
    experts_per_token: int = 2
    expert_d_ff: int | None = None
    shared_expert_d_ff: int | None = None
    shared_expert_gate: bool = False
    router_renormalise: bool = True
    capacity_factor: float | None = None
    expert_bias: bool = False
    head_bias: bool = False
    tied_embeddings: bool = False
    head_norm: str = "none"
    embed_norm: bool = False
    embedding_scale: float = 1.0
    position_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    base_d_model: int | None = None
    layer_overrides: tuple[tuple[int, str, bool | int | float | str | RopeScaling | None], ...] = ()

    def __post_init__(self) -> None:
        overrides = tuple(tuple(override) for override in self.layer_overrides)
        object.__setattr__(self, "layer_overrides", overrides)  # lists would not hash
        for field, known in NAMES.items():
            check_name(f"model.{field}", getattr(self, field), known)
        check_sizes(self)
        check_combinations(self)
        check_experts(self)
        check_overrides(self, GLOBAL_FIELDS)

    def resolve(self) -> ModelConfig:
        """The same model with every derived size (`kv_heads`, `head_dim`, `d_ff`, `rotary_dim`, …)
        written out.
        """
        head_dim = self.head_dim or self.d_model // self.num_heads
        scale = head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        eps = self.norm_eps if self.final_norm_eps is None else self.final_norm_eps
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or _default_kv_heads(self),
            head_dim=head_dim,
            d_ff=self.d_ff or _default_d_ff(self),
            expert_d_ff=self.expert_d_ff or self.d_ff or _default_d_ff(self),
            rotary_dim=self.rotary_dim or head_dim,
            attention_scale=scale,
            final_norm_eps=eps,
        )

    def layer(self, index: int) -> ModelConfig:
        """The resolved config of one layer, its overrides applied."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of a model with layers 0..{self.num_layers - 1}")
        changes = {field: value for layer, field, value in self.layer_overrides if layer == index}
        return dataclasses.replace(self, layer_overrides=(), **changes).resolve()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of consecutive equal layers, in order."""
        segments: list[Segment] = []
        for index in range(self.num_layers):
            layer = self.layer(index)
            if segments and segments[-1].layer == layer:
                segments[-1] = Segment(segments[-1].start, index + 1, layer)
            else:
                segments.append(Segment(index, index + 1, layer))
        return tuple(segments)


@dataclass(frozen=True)
class Segment:
    """Layers `start..stop-1`, all with the resolved config `layer`."""

    start: int
    stop: int
    layer: ModelConfig

    @property
    def name(self) -> str:
        """Its key under `layers/` in the params tree: `000-006`."""
        return f"{self.start:03d}-{self.stop:03d}"

    def __len__(self) -> int:
        return self.stop - self.start


def mup(config: ModelConfig, base_d_model: int, base_head_dim: int | None = None) -> ModelConfig:
    """The config with muP multipliers for hyper-parameters tuned at width `base_d_model` (Tensor
    Programs V, table 8).

    Logits are multiplied by `base_d_model / d_model`, and `model.rules` then scales the initial
    values and learning rates of hidden matrices by width. Where heads grow with the width,
    `base_head_dim` (the base model's) turns the attention scale into `sqrt(base_head_dim) /
    head_dim`.
    """
    scale = config.attention_scale
    if base_head_dim is not None:
        head_dim = config.head_dim or config.d_model // config.num_heads
        scale = base_head_dim**0.5 / head_dim
    return dataclasses.replace(
        config,
        base_d_model=base_d_model,
        logit_scale=config.logit_scale * base_d_model / config.d_model,
        attention_scale=scale,
    )


def _default_kv_heads(config: ModelConfig) -> int:
    """A mixture of attention heads asks each key head once for each of a token's experts."""
    if config.mixer == "attention_experts":
        return config.num_heads // config.experts_per_token
    return config.num_heads


def _default_d_ff(config: ModelConfig) -> int:
    if config.feed_forward == "plain":
        return 4 * config.d_model
    return -(-config.d_model * 8 // (3 * 64)) * 64
