"""What the kernel of `stream_gpu` makes of a product of queries and keys, in registers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_operations as gpu
from kernels_pallas.decode_attention.stream import Masking

Array = jax.Array
LOG2E = math.log2(math.e)


class Span(NamedTuple):
    """The sequence of an item: the scalars of `stream.Items`, and the first slot of a block."""

    begin: Any
    end: Any
    shift: Any
    length: Any
    slot: Any


def logits(masking: Masking, scores: Array, distance: Array, slopes: Array | None) -> Array:
    """Of scores `[rows, keys]`, in base 2."""
    if masking.soft_cap is None and slopes is None:
        return scores * (masking.scale * LOG2E)
    scores = scores * masking.scale
    if slopes is not None:
        scores = scores - gpu.down(slopes, scores.shape) * distance.astype(jnp.float32)
    if masking.soft_cap is not None:
        scores = masking.soft_cap * jnp.tanh(scores * (1 / masking.soft_cap))
    return scores * LOG2E


def visible(
    masking: Masking, span: Span, tokens: Array, shape: tuple[int, ...], simulate: bool
) -> tuple[Array, Array]:
    """What each row, of a token, may see of a block, and the distances: `[rows, keys]`."""
    mine = (tokens >= span.begin) & (tokens < span.end)
    slot = iota(shape, 1, simulate) + span.slot
    seen = gpu.down(jnp.where(mine, span.length, 0), shape) > slot
    key = slot
    if masking.ring is not None:
        newest = span.end + span.shift - 1
        behind = jax.lax.rem(newest, jnp.int32(masking.ring)) - slot
        key = newest - jnp.where(behind < 0, behind + masking.ring, behind)
    distance = gpu.down(tokens + span.shift, shape) - key
    if masking.causal:
        seen = seen & (distance >= 0)
    if masking.window is not None:
        near = distance < masking.window
        seen = seen & (near | (key < masking.sinks) if masking.sinks else near)
    return seen, distance


def iota(shape: tuple[int, ...], axis: int, simulate: bool) -> Array:
    """Numbers along an axis, laid out as a product."""
    if simulate:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=gpu.matrix())
