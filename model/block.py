"""A block: mixer, feed-forward and the residual topology that joins them, each picked by name in
the config.

    block(params, x, config, context, carry) -> (x, carry, aux)

`carry` is a dict of arrays that travel over depth beside the hidden state (the segment's cache, a
recurrent router's state); its shapes do not change from layer to layer. `aux` holds what a layer
reports (losses, statistics) and, under "taps", the intermediates asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model import norms
from model.arrays import ArraySpec, Part
from model.config import ModelConfig
from model.context import Context
from model.feed_forwards import FEED_FORWARDS
from model.mixers import MIXERS
from sharding import constrain
from weights import nearest

Array = jax.Array
Carry = dict[str, Any]
Aux = dict[str, Any]


def arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays of one block, by path below the segment; `config` is the layer's resolved
    config.
    """
    mixer, feed_forward = _parts(config)
    specs = {}
    for part in (mixer, feed_forward):
        for path, spec in part.arrays(config).items():
            specs[f"{part.key}/{path}"] = spec
    for norm in _norm_keys(config, mixer, feed_forward):
        for path, spec in norms.arrays(config.norm, config.d_model).items():
            specs[f"{norm}/{path}"] = spec
    return specs


def block(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: Carry | None = None,
) -> tuple[Array, Carry, Aux]:
    """One layer.

    Args:
        params: arrays of one layer, as listed by `arrays`.
        x: `[batch, length, d_model]`, the residual stream.
        config: the layer's resolved config (`ModelConfig.layer(i)`).
        context: positions, segments, runtime (`model.context.Context`).
        carry: what travels over depth; None is empty.

    Returns:
        The new residual stream, the new carry, and `aux` with `aux["taps"]` if the context asks for
        taps.
    """
    x, carry, aux = RESIDUALS[config.residual](params, x, config, context, carry or {})
    x = constrain(x, ("batch", "length", "hidden"), context.runtime.layout)
    taps = {**aux.pop("taps"), "hidden": x}
    unknown = sorted(context.taps - set(taps))
    if unknown:
        near = nearest(unknown[0], taps) or "none"
        raise ValueError(
            f"tap {unknown[0]!r}: nearest: {near}; a block has {', '.join(sorted(taps))}"
        )
    if context.taps:
        aux["taps"] = {name: taps[name] for name in sorted(context.taps)}
    return x, carry, aux


def _sequential(
    params: Mapping[str, Any], x: Array, config: ModelConfig, context: Context, carry: Carry
) -> tuple[Array, Carry, Aux]:
    """`x = x + mixer(x); x = x + feed_forward(x)`, with norms where `norm_position` says.

    "sequential_normed" is `h = norm(x); x = h + mixer(h)`, and so for the feed-forward (BLOOM's
    `apply_residual_connection_post_layernorm`).
    """
    merged: Aux = {"taps": {}}
    for index, part in enumerate(_parts(config)):
        h = _norm(params, f"{part.key}_norm", x, config) if _norms_before(config) else x
        y, carry, aux = part.apply(params[part.key], h, config, context, carry)
        if _norms_after(config):
            y = _norm(params, f"{part.key}_output_norm", y, config)
        start = h if config.residual == "sequential_normed" else x
        x = start + _branch(y, config, context, index)
        if config.norm_position == "post":
            x = _norm(params, f"{part.key}_norm", x, config)
        _collect(merged, aux, f"{part.key}_output", y)
    return x, carry, merged


def _parallel(
    params: Mapping[str, Any], x: Array, config: ModelConfig, context: Context, carry: Carry
) -> tuple[Array, Carry, Aux]:
    """`x + mixer(norm(x)) + feed_forward(norm'(x))`, with one norm (GPT-J) or two (GPT-NeoX)."""
    merged: Aux = {"taps": {}}
    mixer, _ = _parts(config)
    shared = f"{mixer.key}_norm" if config.residual == "parallel_one_norm" else None
    h, total = None, x
    for index, part in enumerate(_parts(config)):
        if h is None or shared is None:
            h = _norm(params, shared or f"{part.key}_norm", x, config)
        y, carry, aux = part.apply(params[part.key], h, config, context, carry)
        total = total + _branch(y, config, context, index)
        _collect(merged, aux, f"{part.key}_output", y)
    return total, carry, merged


RESIDUALS: dict[str, Callable[..., tuple[Array, Carry, Aux]]] = {
    "sequential": _sequential,
    "sequential_normed": _sequential,
    "parallel_one_norm": _parallel,
    "parallel_two_norms": _parallel,
}
"""Name -> residual topology."""


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zero a share `rate` of the values and divide the rest by `1 - rate`; the identity without an
    rng.
    """
    if rate == 0.0 or rng is None:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def _parts(config: ModelConfig) -> tuple[Part, Part]:
    return MIXERS[config.mixer], FEED_FORWARDS[config.feed_forward]


def _norm_keys(config: ModelConfig, mixer: Part, feed_forward: Part) -> list[str]:
    keys = []
    for part in (mixer, feed_forward):
        shares = config.residual == "parallel_one_norm" and part is feed_forward
        if config.norm_position != "output" and not shares:
            keys.append(f"{part.key}_norm")
        if _norms_after(config):
            keys.append(f"{part.key}_output_norm")
    return keys


def _norms_before(config: ModelConfig) -> bool:
    return config.norm_position in ("pre", "sandwich")


def _norms_after(config: ModelConfig) -> bool:
    return config.norm_position in ("output", "sandwich")


def _norm(params: Mapping[str, Any], key: str, x: Array, config: ModelConfig) -> Array:
    return norms.normalise(config.norm, params.get(key, {}), x, config.norm_eps)


def _branch(y: Array, config: ModelConfig, context: Context, index: int) -> Array:
    """What a part adds to the residual stream: scaled, with dropout."""
    if context.rng is not None:
        y = dropout(y, config.dropout, jax.random.fold_in(context.rng, index))
    return y if config.residual_scale == 1.0 else y * jnp.asarray(config.residual_scale, y.dtype)


def _collect(merged: Aux, aux: Aux, name: str, y: Array) -> None:
    merged["taps"].update({**aux.pop("taps", {}), name: y})
    merged.update(aux)
