"""Norms over the last axis, by name; always computed in float32 and returned in the input's
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from model.arrays import ArraySpec, vector

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, scale: Array | float, bias: Array | None, eps: float) -> Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis (Ba et al. 2016)."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * jnp.asarray(scale, jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def _rms(params: Mapping[str, Array], x: Array, eps: float) -> Array:
    return rms_norm(x, params["scale"], eps)


def _rms_plus_one(params: Mapping[str, Array], x: Array, eps: float) -> Array:
    return rms_norm(x, 1.0 + params["scale"].astype(jnp.float32), eps)


def _layer(params: Mapping[str, Array], x: Array, eps: float) -> Array:
    return layer_norm(x, params["scale"], params.get("bias"), eps)


def _layer_alone(params: Mapping[str, Array], x: Array, eps: float) -> Array:
    return layer_norm(x, 1.0, None, eps)


NORMS: dict[str, Callable[[Mapping[str, Array], Array, float], Array]] = {
    "rmsnorm": _rms,
    "rmsnorm_plus_one": _rms_plus_one,
    "layernorm": _layer,
    "layernorm_nobias": _layer,
    "layernorm_noaffine": _layer_alone,
}
"""Name -> `norm(params, x, eps)`; "rmsnorm_plus_one" stores its scale minus one (Gemma)."""


def arrays(name: str, size: int, axis: str | None = None) -> dict[str, ArraySpec]:
    """The arrays of the norm `name` over `size` channels, which are split as the logical `axis`."""
    if name == "layernorm_noaffine":
        return {}
    scale = vector(size, axis, init="zeros" if name == "rmsnorm_plus_one" else "ones")
    return {"scale": scale, "bias": vector(size, axis)} if name == "layernorm" else {"scale": scale}


def without_bias(name: str) -> str:
    """The norm of the same kind that has no bias."""
    return "layernorm_nobias" if name == "layernorm" else name


def normalise(name: str, params: Mapping[str, Array], x: Array, eps: float) -> Array:
    """The norm `name` of `x [..., channels]`; `params` is empty for the one without arrays."""
    return NORMS[name](params, x, eps)
