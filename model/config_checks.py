"""What a config is refused for; every error names the field, its value and what would be right."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from weights import nearest

if TYPE_CHECKING:
    from model.config import ModelConfig

AT_LEAST_ONE = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "max_length",
    "num_experts",
    "experts_per_token",
)
AT_LEAST_ONE_OR_NONE = (
    "kv_heads",
    "head_dim",
    "d_ff",
    "d_embed",
    "expert_d_ff",
    "shared_expert_d_ff",
    "rotary_dim",
    "sliding_window",
    "base_d_model",
)


def check_name(field: str, value: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless the value of `field` is one of the known names."""
    if value not in known:
        near = nearest(value, known) or "none"
        raise ValueError(f"{field} is {value!r}; nearest: {near}; known: {', '.join(known)}")


def check_sizes(config: ModelConfig) -> None:
    """Raise `ValueError` for a size or rate out of range, or heads that do not divide."""
    for field in AT_LEAST_ONE:
        if getattr(config, field) < 1:
            raise ValueError(f"model.{field} is {getattr(config, field)}; it must be at least 1")
    for field in AT_LEAST_ONE_OR_NONE:
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ValueError(f"model.{field} is {value}; it must be at least 1, or None")
    if config.head_dim is None and config.d_model % config.num_heads:
        raise ValueError(
            f"model.d_model {config.d_model} is not a multiple of model.num_heads "
            f"{config.num_heads}; change one, or set model.head_dim"
        )
    if config.num_heads % (config.kv_heads or config.num_heads):
        divisors = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ValueError(
            f"model.num_heads {config.num_heads} is not a multiple of model.kv_heads "
            f"{config.kv_heads}; kv_heads may be one of {divisors}"
        )
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"model.dropout is {config.dropout}; it must be in [0, 1)")


def check_combinations(config: ModelConfig) -> None:
    """Raise `ValueError` for fields that make no sense together."""
    if config.head_bias and config.tied_embeddings:
        raise ValueError("model.head_bias needs a head of its own: set model.tied_embeddings=False")
    if config.residual != "sequential" and config.norm_position != "pre":
        raise ValueError(
            f"model.residual={config.residual!r} takes its norms before the parts: set "
            f"model.norm_position='pre' (it is {config.norm_position!r})"
        )
    if config.norm == "layernorm_noaffine" and config.qk_norm != "none":
        raise ValueError(
            f"model.qk_norm={config.qk_norm!r} needs a norm with a scale of its own: "
            "model.norm='layernorm_noaffine' has none"
        )
    if config.alibi_scale <= 0.0:
        raise ValueError(f"model.alibi_scale is {config.alibi_scale}; it must be above 0")
    if config.positions == "rope":
        _check_rotary(config)


def check_overrides(config: ModelConfig, global_fields: Collection[str]) -> None:
    """Raise `ValueError` for an override of no layer, of no field that may differ, or to a layer
    that cannot be built.
    """
    fields = {field.name for field in dataclasses.fields(config)} - set(global_fields)
    for layer, field, value in config.layer_overrides:
        where = f"model.layer_overrides ({layer}, {field!r}, {value!r})"
        if not 0 <= layer < config.num_layers:
            raise ValueError(f"{where}: the layers are 0..{config.num_layers - 1}")
        if field not in fields:
            near = nearest(field, fields) or ", ".join(sorted(fields))
            raise ValueError(f"{where}: not a field that may differ by layer; nearest: {near}")
        if field == "positions" and "learned" in (value, config.positions):
            raise ValueError(
                f"{where}: learned positions are added before the first layer, so they cannot "
                f"differ by layer (model.positions is {config.positions!r})"
            )
    for layer in sorted({layer for layer, _, _ in config.layer_overrides}):
        config.layer(layer)


def _check_rotary(config: ModelConfig) -> None:
    head_dim = config.head_dim or config.d_model // config.num_heads
    rotary_dim = config.rotary_dim or head_dim
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"model.rotary_dim is {rotary_dim}; it must be even and at most head_dim {head_dim}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and rotary_dim < 4:
        raise ValueError(
            f"rope_scaling.kind 'dynamic' needs rotary_dim 4 or more, not {rotary_dim}"
        )
    if scaling is not None and scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != rotary_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {len(getattr(scaling, name))} values; "
                    f"rotary_dim {rotary_dim} needs {rotary_dim // 2}"
                )
