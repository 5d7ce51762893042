"""Rotary position embeddings: frequencies, their scalings beyond the trained length, and the
rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from model.config_checks import check_name

if TYPE_CHECKING:
    from model.config import ModelConfig

Array = jax.Array
Tables = tuple[Array, Array]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length.

    kind: "linear", "dynamic" (NTK), "llama3", "yarn", "longrope" or "proportional".
    factor: how many times longer than the trained length.
    original_max_length: the length that the frequencies were trained at, in tokens.
    select: dynamic, longrope: go by the "length" of the longest sequence at hand (with a cache: the
        one planned), or by the "config", its max_length.
    low_freq_factor: llama3: wavelengths above original_max_length / this are divided by factor.
    high_freq_factor: llama3: wavelengths below original_max_length / this stay.
    beta_fast: yarn: rotations within the trained length above which a frequency stays.
    beta_slow: yarn: rotations below which a frequency is divided by factor.
    truncate: yarn: round the bounds of the ramp to whole frequencies.
    mscale: yarn: weight of the attention temperature (DeepSeek); 0 is the paper's formula.
    mscale_all_dim: yarn: divisor of the attention temperature (DeepSeek); 0 is the paper's formula.
    attention_factor: yarn, longrope: multiplies the rotated queries and keys; None derives it.
    short_factor: longrope: one divisor per frequency, up to original_max_length.
    long_factor: longrope: one divisor per frequency, beyond it.
    rotary_share: proportional: share of the channel pairs that rotate, the fastest ones.
    """

    kind: str = "linear"
    factor: float = 1.0
    original_max_length: int = 2048
    select: str = "length"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotary_share: float = 1.0

    def __post_init__(self) -> None:
        check_name("rope_scaling.kind", self.kind, ROPE_SCALINGS)
        check_name("rope_scaling.select", self.select, ("length", "config"))
        for field in ("factor", "original_max_length"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"rope_scaling.{field} is {getattr(self, field)}; it must be at least 1"
                )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be above "
                f"low_freq_factor {self.low_freq_factor}"
            )
        if not 0.0 < self.rotary_share <= 1.0:
            raise ValueError(
                f"rope_scaling.rotary_share is {self.rotary_share}; it must be in (0, 1]"
            )


def rotary_tables(positions: Array, config: ModelConfig, length: Array | int | None) -> Tables:
    """cos and sin of `position * frequency`, each `float32[batch, length, rotary_dim / 2]`, scaling
    applied.

    `length` is that of the longest sequence; None takes it from the positions.
    """
    assert config.rotary_dim is not None
    scaling = config.rope_scaling
    if scaling is not None and scaling.select == "config":
        length = config.max_length
    elif length is None:
        length = jnp.max(positions) + 1
    frequencies, factor = rotary_frequencies(config.rotary_dim, config.rope_base, scaling, length)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotary_frequencies(
    rotary_dim: int, base: float, scaling: RopeScaling | None, length: Array | int
) -> tuple[Array, float]:
    """Angles per position `float32[rotary_dim / 2]`, and the factor on cos and sin.

    `length` is the length of the longest sequence: "dynamic" and "longrope" depend on it.
    """
    plain = 1.0 / base ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if scaling is None:
        return jnp.asarray(plain, jnp.float32), 1.0
    return ROPE_SCALINGS[scaling.kind](plain, base, scaling, length)


def rotate(x: Array, tables: Tables, layout: str) -> Array:
    """Rotate the leading `2 * n` channels of each head, n the width of the tables (Su et al. 2021,
    equation 34).

    Args:
        x: `[batch, length, heads, head_dim]`.
        tables: cos and sin, `float32[batch, length, n]`.
        layout: "half" pairs channel i with i + n; "interleaved" pairs 2 i with 2 i + 1.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    rotary_dim = 2 * cos.shape[-1]
    wide = x[..., :rotary_dim].astype(jnp.float32)
    if layout == "half":
        first, second = jnp.split(wide, 2, axis=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
    parts = (first * cos - second * sin, second * cos + first * sin)
    if layout == "half":
        rotated = jnp.concatenate(parts, axis=-1)
    else:
        rotated = jnp.stack(parts, axis=-1).reshape(wide.shape)
    rotated = rotated.astype(x.dtype)
    if rotary_dim == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., rotary_dim:]], axis=-1)


def _linear(
    plain: np.ndarray, base: float, scaling: RopeScaling, length: Array | int
) -> tuple[Array, float]:
    return jnp.asarray(plain / scaling.factor, jnp.float32), 1.0


def _dynamic(
    plain: np.ndarray, base: float, scaling: RopeScaling, length: Array | int
) -> tuple[Array, float]:
    """NTK-aware: the base grows with the length beyond the trained one."""
    dim = 2 * len(plain)
    trained = scaling.original_max_length
    stretch = scaling.factor * jnp.maximum(length, trained) / trained - (scaling.factor - 1.0)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / (dim - 2)
    return jnp.asarray(plain, jnp.float32) * stretch.astype(jnp.float32) ** -exponents, 1.0


def _llama3(
    plain: np.ndarray, base: float, scaling: RopeScaling, length: Array | int
) -> tuple[Array, float]:
    """Long wavelengths are divided, short ones kept, a linear blend between (Llama 3.1)."""
    rotations = scaling.original_max_length * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((rotations - scaling.low_freq_factor) / span, 0.0, 1.0)
    return jnp.asarray(keep * plain + (1 - keep) * plain / scaling.factor, jnp.float32), 1.0


def _yarn(
    plain: np.ndarray, base: float, scaling: RopeScaling, length: Array | int
) -> tuple[Array, float]:
    """YaRN (Peng et al. 2023, section 3.2 and equation 22)."""
    dim = 2 * len(plain)

    def dimension(rotations: float) -> float:
        ratio = scaling.original_max_length / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(len(plain)) - low) / (high - low if high != low else 1e-3)
    divide = np.clip(ramp, 0.0, 1.0)
    frequencies = divide * plain / scaling.factor + (1 - divide) * plain
    return jnp.asarray(frequencies, jnp.float32), _yarn_temperature(scaling)


def _yarn_temperature(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    log_factor = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (log_factor * scaling.mscale + 1) / (log_factor * scaling.mscale_all_dim + 1)
    return log_factor + 1


def _longrope(
    plain: np.ndarray, base: float, scaling: RopeScaling, length: Array | int
) -> tuple[Array, float]:
    """LongRoPE (Ding et al. 2024): searched divisors, another set beyond the trained length."""
    short, long = (
        jnp.asarray(plain / np.asarray(factors), jnp.float32)
        for factors in (scaling.short_factor, scaling.long_factor)
    )
    factor = scaling.attention_factor
    if factor is None:
        trained = math.log(scaling.original_max_length)
        factor = math.sqrt(1 + math.log(scaling.factor) / trained)
    return jnp.where(length > scaling.original_max_length, long, short), factor


def _proportional(
    plain: np.ndarray, base: float, scaling: RopeScaling, length: Array | int
) -> tuple[Array, float]:
    """Only the fastest share of the pairs rotates (Gemma 4); frequencies are those of all."""
    rotating = np.arange(len(plain)) < int(scaling.rotary_share * len(plain))
    return jnp.asarray(np.where(rotating, plain / scaling.factor, 0.0), jnp.float32), 1.0


ROPE_SCALINGS: dict[str, Callable[..., tuple[Array, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
"""Name -> function of (plain frequencies, base, scaling, length) giving frequencies and the factor
on cos and sin.
"""
