"""The "experts" feed-forward: each token's k gated experts, weighted by the router, and optionally
one expert that all tokens share (Mixtral; Qwen2-MoE; JetMoE).

    y = sum_slot gate_slot expert_slot(x) + [sigmoid(x W_s)] shared(x) + [bias]
    expert(x) = (act(x W_gate) * (x W_up)) W_down
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from model import feed_forward
from model.arrays import ArraySpec, hidden_kernel, output_std, vector
from model.moe.parallel import Work, run
from model.moe.router import route_tokens
from weights import linear

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.context import Context

Array = jax.Array

AXES = {
    "gate": ("experts", "d_model", "d_ff"),
    "up": ("experts", "d_model", "d_ff"),
    "down": ("experts", "d_ff", "d_model"),
}


def arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays of one layer."""
    d_model, experts = config.d_model, config.num_experts
    assert config.expert_d_ff is not None
    sizes = {"d_model": d_model, "d_ff": config.expert_d_ff, "experts": experts}
    specs = {"router/kernel": hidden_kernel(config, (d_model, experts), ("d_model", None))}
    for name, axes in AXES.items():
        std = output_std(config) if name == "down" else 1.0
        shape = tuple(sizes[axis] for axis in axes)
        specs[f"experts/{name}/kernel"] = hidden_kernel(config, shape, axes, std)
    if config.shared_expert_d_ff is not None:
        shared = feed_forward.arrays(config, ("gate", "up"), config.shared_expert_d_ff)
        specs.update({f"shared/{path}": spec for path, spec in shared.items()})
    if config.shared_expert_gate:
        specs["shared_gate/kernel"] = hidden_kernel(config, (d_model, 1), ("d_model", None))
    if config.expert_bias:
        specs["bias"] = vector(d_model, None)
    return specs


def apply(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: dict[str, Any],
) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """`[batch, length, d_model] -> [batch, length, d_model]`; aux holds the router's report."""
    routing, aux, capacity = route_tokens(params["router"], x, config, context, carry)
    activation = feed_forward.ACTIVATIONS[config.activation]
    work = Work(functools.partial(_expert, activation), AXES, sums="d_ff")
    y = run(work, params["experts"], x, routing, context.runtime.layout, capacity=capacity)
    if "shared" in params:
        y = y + _shared(params, x, config, context, carry)
    if "bias" in params:
        y = y + params["bias"].astype(y.dtype)
    return y, carry, aux


def _expert(
    activation: Callable[[Array], Array],
    kernels: Mapping[str, Any],
    rows: Array,
    product: Callable[[Array, Any], Array],
) -> Array:
    hidden = activation(product(rows, kernels["gate"])) * product(rows, kernels["up"])
    return product(hidden, kernels["down"])


def _shared(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: dict[str, Any],
) -> Array:
    """The expert that takes every token, times its own gate if it has one."""
    y, _, _ = feed_forward.apply(params["shared"], x, config, context, carry)
    if "shared_gate" in params:
        gate = jax.nn.sigmoid(linear(params["shared_gate"], x, dtype=jnp.float32))
        y = y * gate.astype(y.dtype)
    return y
