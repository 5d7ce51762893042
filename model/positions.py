"""Where a token stands: rotary embeddings with their scalings, ALiBi slopes.

A `PositionEncoder` belongs to the layers of one segment. Attention hands it, with un-rotated
queries and keys, to the cache when there is one, since some caches own positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from model.config import ModelConfig, RopeScaling

Array = jax.Array
Tables = tuple[Array, Array]


@dataclass(frozen=True)
class PositionEncoder:
    """How one segment's attention sees positions.

    config: resolved config of the segment's layers.
    known: positions whose tables were computed before the layer loop, and the tables.
    """

    config: ModelConfig
    known: tuple[Array, Tables] | None = None

    def prepared(self, positions: Array) -> PositionEncoder:
        """The same encoder with the tables of these positions computed once for all layers."""
        if self.config.positions != "rope":
            return self
        return dataclasses.replace(self, known=(positions, rotary_tables(positions, self.config)))

    def rotate(self, x: Array, positions: Array) -> Array:
        """Queries or keys `[batch, length, heads, head_dim]` at positions `int32[batch, length]`,
        rotated if RoPE.
        """
        if self.config.positions != "rope":
            return x
        if self.known is not None and self.known[0] is positions:
            tables = self.known[1]
        else:
            tables = rotary_tables(positions, self.config)
        return rotate(x, tables, self.config.rotary_layout)

    def slopes(self) -> Array | None:
        """ALiBi slopes `float32[num_heads]`, or None."""
        if self.config.positions != "alibi":
            return None
        return jnp.asarray(alibi_slopes(self.config.num_heads))


def alibi_slopes(num_heads: int) -> np.ndarray:
    """`float32[num_heads]`: `2 ** (-8 i / n)` for i = 1..n where n is a power of two (Press et al.
    2022).

    Otherwise the slopes of the power of two below, then every second slope of the one above, as
    BLOOM does.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    slopes += [2.0 ** (-4.0 * i / below) for i in range(1, 2 * below, 2)]
    return np.asarray(slopes[:num_heads], np.float32)


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


def rotary_tables(positions: Array, config: ModelConfig) -> Tables:
    """cos and sin of `position * frequency`, each `float32[batch, length, rotary_dim / 2]`, scaling
    applied.
    """
    assert config.rotary_dim is not None
    frequencies, factor = rotary_frequencies(
        config.rotary_dim, config.rope_base, config.rope_scaling, jnp.max(positions) + 1
    )
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotary_frequencies(
    rotary_dim: int, base: float, scaling: RopeScaling | None, length: Array | int
) -> tuple[Array, float]:
    """Angles per position `float32[rotary_dim / 2]`, and the factor on cos and sin.

    `length` is the length of the longest sequence at hand: "dynamic" and "longrope" depend on it.
    """
    plain = 1.0 / base ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if scaling is None:
        return jnp.asarray(plain, jnp.float32), 1.0
    return ROPE_SCALINGS[scaling.kind](plain, base, scaling, length)


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


ROPE_SCALINGS: dict[str, Callable[..., tuple[Array, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Name -> function of (plain frequencies, base, scaling, length) giving frequencies and the factor
on cos and sin.
"""
