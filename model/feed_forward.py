"""Feed-forwards by name: gated (SwiGLU and its kin) and plain.

gated: (act(x W_gate) * (x W_up)) W_down        plain: act(x W_up) W_down
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from model.arrays import ArraySpec, Part, hidden_kernel, output_std, vector
from sharding import constrain
from weights import linear

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.context import Context

Array = jax.Array


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": _relu2,
}


def _apply(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: dict[str, Any],
) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """`[batch, length, d_model] -> [batch, length, d_model]`, gated if the params hold a gate."""
    activation = ACTIVATIONS[config.activation]
    up = linear(params["up"], x)
    hidden = activation(linear(params["gate"], x)) * up if "gate" in params else activation(up)
    hidden = constrain(hidden, ("batch", "length", "d_ff"), context.runtime.layout)
    return linear(params["down"], hidden), carry, {"taps": {"feed_forward_hidden": hidden}}


def _arrays(config: ModelConfig, inputs: tuple[str, ...]) -> dict[str, ArraySpec]:
    d_model, d_ff = config.d_model, config.d_ff
    assert d_ff is not None
    arrays = {}
    for name in inputs:
        arrays[f"{name}/kernel"] = hidden_kernel(config, (d_model, d_ff), ("d_model", "d_ff"))
    arrays["down/kernel"] = hidden_kernel(
        config, (d_ff, d_model), ("d_ff", "d_model"), output_std(config)
    )
    if config.feed_forward_bias:
        arrays.update({f"{name}/bias": vector(d_ff, "d_ff") for name in inputs})
        arrays["down/bias"] = vector(d_model, None)
    return arrays


def _gated_arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    return _arrays(config, ("gate", "up"))


def _plain_arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    return _arrays(config, ("up",))


FEED_FORWARDS: dict[str, Part] = {
    "gated": Part("feed_forward", _gated_arrays, _apply),
    "plain": Part("feed_forward", _plain_arrays, _apply),
}
"""Name -> feed-forward."""
