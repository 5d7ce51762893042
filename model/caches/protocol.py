"""What a cache must do, and the cache of a whole decoder: one cache for each segment of layers.

A cache is a pytree whose arrays carry a leading layer axis. It travels in the carry of the loop
over layers and is written in place at the layer's index, so a step never holds two of it. A mixer
appends and attends, and never looks inside; keys and queries arrive un-rotated, with the position
encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from model.positions import PositionEncoder
from sharding import Layout

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMeta:
    """The tokens of one step.

    positions: int32[batch, length], absolute position of each token, or of the one before padding.
    valid: bool[batch, length], False for padding, which is not stored.
    lengths: int32[batch], tokens that each row holds after this step.
    padded: whether any token may be padding; else they are the last `length` of each row, in order.
    """

    positions: Array
    valid: Array
    lengths: Array
    padded: bool = dataclasses.field(default=True, metadata={"static": True})


class Cache(Protocol):
    """Keys and values of the layers of one segment."""

    def append(
        self, layer: Any, k: Array, v: Array, meta: StepMeta, encoder: PositionEncoder
    ) -> Cache:
        """Store un-rotated k and v `[batch, length, kv_heads, head_dim]` of a step at a layer."""
        ...

    def attend(
        self,
        layer: Any,
        q: Array,
        meta: StepMeta,
        encoder: PositionEncoder,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        return_lse: bool = False,
        implementation: str | None = None,
        layout: Layout | None = None,
    ) -> Any:
        """Causal attention of un-rotated q `[batch, length, heads, head_dim]` to all that is stored
        at a layer.

        Returns `[batch, length, heads, head_dim]`, and with `return_lse` also `float32[batch,
        length, heads]`.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderCache:
    """The caches of a decoder, and how many tokens each row holds.

    segments: name of a segment -> its cache.
    lengths: int32[batch].
    planned_length: int32[], the longest that a row is meant to grow; rotary scalings that depend on
        the length go by it and never change in mid-sequence.
    """

    segments: dict[str, Any]
    lengths: Array
    planned_length: Array

    def step(self, shape: tuple[int, ...], segment_ids: Array | None) -> StepMeta:
        """Where the next tokens stand: after what each row holds; segment id 0 marks padding, on
        either side, which takes no place.
        """
        valid = jnp.ones(shape[:2], bool) if segment_ids is None else segment_ids > 0
        held = self.lengths[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        return StepMeta(
            jnp.maximum(held - 1, 0), valid, held[:, -1], padded=segment_ids is not None
        )

    def advance(self, segments: Mapping[str, Any], meta: StepMeta) -> DecoderCache:
        """The cache after a step, with the caches that the layers returned."""
        return dataclasses.replace(
            self, segments={**self.segments, **segments}, lengths=meta.lengths
        )
