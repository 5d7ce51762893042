"""What each expert of a mixture reads: the tokens that the router sends to it.

An expert's statistics come from its own tokens. One that got few of them borrows from all experts
of its layer, since a Gram matrix of K channels needs about as many tokens to say anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model import ACTIVATIONS, ModelConfig
from model.moe.router import capacity_of_row, route
from surgery import calibration
from surgery.calibration import Stats
from weights import matmul

Array = jax.Array
FOLDER = "feed_forward/experts"
INPUTS = (f"{FOLDER}/gate/kernel", f"{FOLDER}/up/kernel")
MIDDLE = (f"{FOLDER}/down/kernel",)
ROUTER = "feed_forward/router/kernel"
LOGITS = "router_logits"


@dataclass(frozen=True)
class Routed:
    """The inputs of a layer's experts.

    x: `[batch, length, d_model]`, what the mixture reads.
    chosen: `bool[batch, length, experts]`, which experts a token is sent to.
    kernels: gate and up of each expert, if what their products give is meant; else None.
    activation: of the gate, a name.
    """

    x: Array
    chosen: Array
    kernels: tuple[Any, Any] | None
    activation: str


def inputs(
    weights: Mapping[str, Any], x: Array, logits: Array, layer: ModelConfig
) -> dict[tuple[str, ...], Routed]:
    """By the paths of the kernels that read them, what a layer's experts read; `logits` are its
    router's.
    """
    k, factor, capacity = layer.experts_per_token, layer.capacity_factor, None
    if factor is not None:
        capacity = capacity_of_row(factor, k, x.shape[1], layer.num_experts)
    routing = route(logits, k, renormalise=layer.router_renormalise, capacity=capacity)
    sent = jax.nn.one_hot(routing.index, layer.num_experts, dtype=bool)
    chosen = jnp.any(sent & routing.kept[..., None], axis=-2)
    gate_and_up = (weights[INPUTS[0]], weights[INPUTS[1]])
    return {
        INPUTS: Routed(x, chosen, None, layer.activation),
        MIDDLE: Routed(x, chosen, gate_and_up, layer.activation),
    }


def update_parts(stats: Stats, routed: Routed) -> Stats:
    """Statistics `[parts, experts, …]` with a batch added, each part by its share of it."""
    parts = stats.count.shape[0]
    x = routed.x.reshape(parts, -1, routed.x.shape[-1])
    chosen = routed.chosen.reshape(parts, x.shape[1], -1)
    activation = ACTIVATIONS[routed.activation]

    def part(stats: Stats, x: Array, chosen: Array) -> Stats:
        def expert(piece: tuple[Stats, Array, Any]) -> Stats:
            own, mine, kernels = piece
            if kernels is None:
                return calibration.update(own, x, mine)
            gate, up = kernels
            return calibration.update(own, activation(matmul(x, gate)) * matmul(x, up), mine)

        return jax.lax.map(expert, (stats, chosen.T, routed.kernels))

    return jax.vmap(part)(stats, x, chosen)


def pooled_share(count: Array, width: int) -> Array:
    """How much of an expert's statistics is taken from all experts: 0 from `width / 4` tokens on,
    1 without any.
    """
    return jnp.clip(1 - count / (width / 4), 0.0, 1.0)


def pooled(stats: Stats) -> Stats:
    """Statistics `[experts, …]`, those of experts with few tokens filled up by `pooled_share`."""
    share = pooled_share(stats.count, stats.total.shape[-1])
    tokens, whole = jnp.maximum(stats.count, 1), jnp.maximum(jnp.sum(stats.count), 1)

    def mixed(own: Array) -> Array:
        lead = (-1,) + (1,) * (own.ndim - 1)
        t, n = share.reshape(lead), tokens.reshape(lead)
        return (1 - t) * own + t * n * (jnp.sum(own, axis=0) / whole)

    few = share[:, None] > 0
    return Stats(
        gram=mixed(stats.gram),
        count=stats.count,
        total=mixed(stats.total),
        absolute=mixed(stats.absolute),
        low=jnp.where(few, jnp.min(stats.low, axis=0), stats.low),
        high=jnp.where(few, jnp.max(stats.high, axis=0), stats.high),
    )
