"""The router: which experts each token goes to, with what weight, and how even the load is.

Logits and softmax are float32 whatever the activations are. Of equal logits the lower index is
chosen. Padding goes nowhere and is counted in no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sharding import constrain
from weights import linear

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.context import Context

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where the tokens of `[batch, length]` go, each to k experts in falling order of logit.

    index: int32[batch, length, k], experts.
    gate: float32[batch, length, k], what an expert's output is multiplied by.
    kept: bool[batch, length, k], False for padding and for what an expert had no room for.
    place: int32[batch, length, k], which of an expert's tokens of its row a token is; None without
        a capacity.
    """

    index: Array
    gate: Array
    kept: Array
    place: Array | None


def route_tokens(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: Mapping[str, Any],
    prefix: str = "",
) -> tuple[Routing, dict[str, Any], int | None]:
    """Routing of `[batch, length, d_model]` by a layer's router, what it reports, its capacity.

    Names of the report begin with `prefix`; under "taps" are the logits. With a cache there is no
    capacity: a row then comes in steps, and a token's share must not depend on them.
    """
    logits = linear(params, x.astype(jnp.float32))
    logits = constrain(logits, ("batch", "length", None), context.runtime.layout)
    valid = None if context.segment_ids is None else context.segment_ids > 0
    k, factor = config.experts_per_token, config.capacity_factor
    capacity = None
    if factor is not None and "cache" not in carry:
        capacity = capacity_of_row(factor, k, x.shape[1], config.num_experts)
    routing = route(
        logits, k, renormalise=config.router_renormalise, valid=valid, capacity=capacity
    )
    aux = statistics(logits, routing, valid, prefix)
    return routing, {**aux, "taps": {f"{prefix}router_logits": logits}}, capacity


def route(
    logits: Array,
    k: int,
    *,
    renormalise: bool,
    valid: Array | None = None,
    capacity: int | None = None,
) -> Routing:
    """The k likeliest experts of each token.

    Args:
        logits: float32 `[batch, length, experts]`.
        k: experts of a token.
        renormalise: gates are a softmax over the k chosen logits, so they sum to 1; else over all.
        valid: `bool[batch, length]`, False for padding; None is all True.
        capacity: most tokens of a row that one expert takes. First choices come before second
            choices, each in order of position (GShard, arXiv 2006.16668, algorithm 1). None has
            room for all.
    """
    _, index = jax.lax.top_k(jax.lax.stop_gradient(logits), k)
    chosen = jnp.sum(_one_hot(index, logits) * logits[..., None, :], axis=-1)
    over = chosen if renormalise else logits
    gate = jnp.exp(chosen - jax.nn.logsumexp(over, axis=-1, keepdims=True))
    shape = index.shape
    kept = jnp.ones(shape, bool) if valid is None else jnp.broadcast_to(valid[..., None], shape)
    if capacity is None:
        return Routing(index, gate, kept, None)
    place = _places(index, kept, logits.shape[-1])
    return Routing(index, gate, kept & (place < capacity), place)


def capacity_of_row(factor: float, k: int, length: int, experts: int) -> int:
    """Tokens of a row that an expert takes: `ceil(factor * k * length / experts)`."""
    return math.ceil(factor * k * length / experts)


def statistics(
    logits: Array, routing: Routing, valid: Array | None, prefix: str = ""
) -> dict[str, Array]:
    """What a router reports, float32, over all tokens of the batch that are not padding.

    With f_e the share of assignments (token, slot) that chose expert e, before any is dropped, and
    P_e the mean of its probability:

    load_balance: `E sum_e f_e P_e`, 1 if both are even (Switch, arXiv 2101.03961, equation 4,
        divided by k).
    router_z: mean of the squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, equation 5).
    dropped: share of assignments that an expert had no room for.
    expert_load: `[experts]`, f.
    expert_probability: `[experts]`, P.
    """
    experts, k = logits.shape[-1], routing.index.shape[-1]
    mask = jnp.ones(logits.shape[:-1]) if valid is None else valid.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(mask), 1.0)
    chosen = jnp.sum(_one_hot(routing.index, logits), axis=-2)
    load = jnp.sum(mask[..., None] * chosen, axis=(0, 1)) / (k * total)
    probabilities = jax.nn.softmax(logits, axis=-1)
    probability = jnp.sum(mask[..., None] * probabilities, axis=(0, 1)) / total
    squared = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    kept = jnp.sum(routing.kept, dtype=jnp.float32)
    found = {
        "load_balance": experts * jnp.sum(load * probability),
        "router_z": jnp.sum(mask * squared) / total,
        "dropped": jnp.where(jnp.sum(mask) > 0, 1.0 - kept / (k * total), 0.0),
        "expert_load": load,
        "expert_probability": probability,
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def _places(index: Array, kept: Array, experts: int) -> Array:
    """`int32[batch, length, k]`: how many assignments of the row to the same expert come before."""
    before = jnp.zeros((index.shape[0], 1, experts), jnp.int32)
    places = []
    for slot in range(index.shape[-1]):
        mine = jax.nn.one_hot(index[..., slot], experts, dtype=jnp.int32) * kept[..., slot, None]
        count = before + jnp.cumsum(mine, axis=1) - mine
        places.append(jnp.sum(count * mine, axis=-1))
        before = before + jnp.sum(mine, axis=1, keepdims=True)
    return jnp.stack(places, axis=-1)


def _one_hot(index: Array, logits: Array) -> Array:
    """`float32[..., k, experts]`; a sum over it is a gather whose gradient is no scatter."""
    return jax.nn.one_hot(index, logits.shape[-1], dtype=jnp.float32)
