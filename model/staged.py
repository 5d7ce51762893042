"""The forward pass in parts, for pipelines: what stands before the layers, a run of equal layers,
what stands behind. Together they are `model.forward`.

A pipeline needs layers that are stored as one stack and compute the same, since all its stages run
one program (`sharding.pipeline`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.block import block
from model.config import ModelConfig, Segment
from model.decoder import (
    check_length,
    embedded,
    final_normed,
    longest_of,
    positions_of,
    segment_context,
    token_inputs,
)
from model.head import logits
from model.positions import PositionEncoder
from model.remat import remat
from model.runtime import Runtime

Array = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Any]


def only_segment(config: ModelConfig) -> Segment:
    """The segment of a model of equal layers. Raises `ValueError` if there are several."""
    if len(config.segments) != 1:
        names = ", ".join(segment.name for segment in config.segments[:6])
        raise ValueError(
            f"mesh.stage above 1 needs layers of one kind; this model's are stacked as {names}"
            f"{', …' if len(config.segments) > 6 else ''} (model.layer_overrides): use mesh.stage=1"
        )
    return config.segments[0]


def enter(
    params: Params, batch: Batch, rng: Array | None, config: ModelConfig, runtime: Runtime
) -> Array:
    """What the first layer reads, `[batch, length, d_model]` in the compute dtype.

    batch: `tokens`, and `positions` and `segment_ids` if it has them, `int32[batch, length]`.
    """
    x = token_inputs(params, batch["tokens"], None, config, runtime)
    check_length(x.shape[1], config)
    return embedded(params, x, _positions(batch), config, runtime, rng)


def run_layers(
    stack: Params,
    x: Array,
    first: Array,
    batch: Batch,
    rng: Array | None,
    segment: Segment,
    runtime: Runtime,
    count: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Layers `first, first + 1, …` of a segment, as many as the stack `[layers, …]` holds, or the
    first `count` of them: the others do nothing.

    `first` and `count` may be traced. Returns the residual stream and what layers report,
    `[layers, …]`.
    """
    segment_ids, positions = batch.get("segment_ids"), _positions(batch)
    encoder = PositionEncoder(segment.layer, longest_of(positions, segment_ids)).prepared(positions)
    context = segment_context(segment, positions, segment_ids, encoder, runtime, rng, None)

    def body(x: Array, inputs: tuple[Any, Array]) -> tuple[Array, Any]:
        params, index = inputs
        key = None if rng is None else jax.random.fold_in(rng, segment.start + first + index)
        here = dataclasses.replace(context, layer=index, rng=key)

        def layer(x: Array) -> tuple[Array, Any]:
            made, _, aux = block(params, x, segment.layer, here)
            return made, aux

        def nothing(x: Array) -> tuple[Array, Any]:
            _, aux = jax.eval_shape(layer, x)
            return x, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), aux)

        return layer(x) if count is None else jax.lax.cond(index < count, layer, nothing, x)

    turns = jax.tree.leaves(stack)[0].shape[0]
    unroll = min(runtime.scan_unroll or turns, turns)
    body = remat(body, runtime.remat, in_loop=True)  # that over ticks
    return jax.lax.scan(body, x, (stack, jnp.arange(turns)), unroll=unroll)


def leave(params: Params, x: Array, config: ModelConfig, runtime: Runtime) -> Array:
    """Final norm and head: logits `float32[batch, length, vocab]`."""
    return logits(params, final_normed(params, x, config), config, runtime)


def _positions(batch: Batch) -> Array:
    return positions_of(
        batch["tokens"].shape, batch.get("positions"), batch.get("segment_ids"), None
    )
