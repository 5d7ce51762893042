"""The fields of a mixture that cannot go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import ModelConfig


def check_experts(config: ModelConfig) -> None:
    """Raise `ValueError` naming the field of a mixture that does not fit the others."""
    mixed_heads, mixed = config.mixer == "attention_experts", config.feed_forward == "experts"
    if config.capacity_factor is not None and config.capacity_factor <= 0:
        raise ValueError(
            f"model.capacity_factor is {config.capacity_factor}; it must be above 0, or None"
        )
    if config.shared_expert_gate and config.shared_expert_d_ff is None:
        raise ValueError("model.shared_expert_gate needs model.shared_expert_d_ff")
    if (mixed or mixed_heads) and config.experts_per_token > config.num_experts:
        raise ValueError(
            f"model.experts_per_token is {config.experts_per_token}; it may be at most "
            f"model.num_experts, {config.num_experts}"
        )
    if mixed and config.feed_forward_bias:
        raise ValueError(
            "model.feed_forward_bias: experts have no biases; model.expert_bias adds one to the "
            "output of the mixture"
        )
    if mixed_heads:
        _check_heads(config)


def _check_heads(config: ModelConfig) -> None:
    k = config.experts_per_token
    kv_heads = config.kv_heads or config.num_heads // k
    if config.num_heads != kv_heads * k:
        raise ValueError(
            f"model.num_heads is {config.num_heads}; a mixture of attention heads has "
            f"kv_heads * experts_per_token = {kv_heads} * {k} = {kv_heads * k} of them"
        )
    for field, value in {"qkv_bias": False, "output_bias": False, "qk_norm": "none"}.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"model.{field} is {getattr(config, field)!r}; a mixture of attention heads takes "
                f"{value!r} only (its one bias is model.expert_bias)"
            )
