"""Dense feed-forwards: gated (SwiGLU and its kin) and plain.

gated: (act(x W_gate) * (x W_up)) W_down        plain: act(x W_up) W_down
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from model.arrays import ArraySpec, hidden_kernel, output_std, vector
from sharding import constrain, split_linear

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


def apply(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: dict[str, Any],
) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """`[batch, length, d_model] -> [batch, length, d_model]`, gated if the params hold a gate."""
    activation, layout = ACTIVATIONS[config.activation], context.runtime.layout
    axes = ("d_model", "d_ff")
    up = split_linear(params["up"], x, axes, layout, context.key("up"))
    if "gate" in params:
        gate = split_linear(params["gate"], x, axes, layout, context.key("gate"))
        hidden = activation(gate) * up
    else:
        hidden = activation(up)
    hidden = constrain(hidden, ("batch", "length", "d_ff"), layout)
    y = split_linear(params["down"], hidden, axes[::-1], layout, context.key("down"))
    return y, carry, {"taps": {"feed_forward_hidden": hidden}}


def arrays(config: ModelConfig, inputs: tuple[str, ...], d_ff: int) -> dict[str, ArraySpec]:
    """The arrays of a feed-forward of width `d_ff` with these input projections."""
    d_model, specs = config.d_model, {}
    for name in inputs:
        specs[f"{name}/kernel"] = hidden_kernel(config, (d_model, d_ff), ("d_model", "d_ff"))
    specs["down/kernel"] = hidden_kernel(
        config, (d_ff, d_model), ("d_ff", "d_model"), output_std(config)
    )
    if config.feed_forward_bias:
        specs.update({f"{name}/bias": vector(d_ff, "d_ff") for name in inputs})
        specs["down/bias"] = vector(d_model, None)
    return specs


def gated_arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays of one gated layer."""
    assert config.d_ff is not None
    return arrays(config, ("gate", "up"), config.d_ff)


def plain_arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays of one plain layer."""
    assert config.d_ff is not None
    return arrays(config, ("up",), config.d_ff)
