"""The "attention_experts" mixer: a mixture of attention heads (JetMoE, arXiv 2404.07413).

Keys and values are those of all tokens; an expert is a query and an output projection. A token's k
experts give k query heads for each key head, and each expert's output is weighted by its gate:

    y = sum_slot gate_slot attention(x W_query^e, K, V) W_output^e + [bias]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from model import attention
from model.arrays import ArraySpec, hidden_kernel, output_std, vector
from model.moe.parallel import Work, run
from model.moe.router import route_tokens
from sharding import constrain
from weights import linear

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.context import Context

Array = jax.Array

QUERY = {"query": ("experts", "d_model", "kv_heads")}
OUTPUT = {"output": ("experts", "kv_heads", "d_model")}


def arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays of one layer."""
    d_model, experts = config.d_model, config.num_experts
    assert config.kv_heads is not None
    assert config.head_dim is not None
    width = config.kv_heads * config.head_dim
    sizes = {"d_model": d_model, "kv_heads": width, "experts": experts}
    specs = {"router/kernel": hidden_kernel(config, (d_model, experts), ("d_model", None))}
    for name, axes in (QUERY | OUTPUT).items():
        std = output_std(config) if name == "output" else 1.0
        shape = tuple(sizes[axis] for axis in axes)
        specs[f"experts/{name}/kernel"] = hidden_kernel(config, shape, axes, std)
    for name in ("key", "value"):
        specs[f"{name}/kernel"] = hidden_kernel(config, (d_model, width), ("d_model", "kv_heads"))
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
    """`[batch, length, d_model] -> [batch, length, d_model]`; aux holds the router's report, its
    names beginning with "attention_".
    """
    layout, experts = context.runtime.layout, params["experts"]
    routing, aux, capacity = route_tokens(params["router"], x, config, context, carry, "attention_")
    work = Work(_project("query"), QUERY, outputs="kv_heads")
    q = run(work, experts, x, routing, layout, combined=False, capacity=capacity)
    q = _heads_of_slots(q, config)
    q = constrain(q, ("batch", "length", "heads", None), layout)
    k, v = (_key_heads(params[name], x, config, context) for name in ("key", "value"))
    out, carry = attention.attend(q, k, v, config, context, carry)
    work = Work(_project("output"), OUTPUT, inputs="kv_heads", sums="kv_heads")
    y = run(work, experts, _slots_of_heads(out, config), routing, layout, capacity=capacity)
    if "bias" in params:
        y = y + params["bias"].astype(y.dtype)
    taps = {**aux["taps"], "query": q, "key": k, "value": v, "attention_heads": out}
    taps |= attention.weights_tap(q, k, config, context, carry)
    return y, carry, {**aux, "taps": taps}


def _project(name: str) -> Callable[..., Array]:
    def function(
        kernels: Mapping[str, Any], rows: Array, product: Callable[[Array, Any], Array]
    ) -> Array:
        return product(rows, kernels[name])

    return function


def _key_heads(params: Mapping[str, Any], x: Array, config: ModelConfig, context: Context) -> Array:
    y = linear(params, x).reshape(*x.shape[:2], -1, config.head_dim)
    return constrain(y, ("batch", "length", "kv_heads", None), context.runtime.layout)


def _heads_of_slots(q: Array, config: ModelConfig) -> Array:
    """`[batch, length, k, kv_heads * head_dim] -> [batch, length, heads, head_dim]`.

    The heads that share a key head stand together, as attention expects, so that keys and values
    need not be repeated.
    """
    q = q.reshape(*q.shape[:3], config.kv_heads, config.head_dim)
    return jnp.swapaxes(q, 2, 3).reshape(*q.shape[:2], -1, config.head_dim)


def _slots_of_heads(out: Array, config: ModelConfig) -> Array:
    """The inverse of `_heads_of_slots`."""
    shape = (*out.shape[:2], config.kv_heads, config.experts_per_token, config.head_dim)
    return jnp.swapaxes(out.reshape(shape), 2, 3).reshape(*shape[:2], shape[3], -1)
