"""What a block knows beside its params and input: where each token stands, and how to run."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import jax

from model.caches.protocol import StepMeta
from model.positions import PositionEncoder
from model.runtime import Runtime

Array = jax.Array


@dataclass(frozen=True)
class Context:
    """The surroundings of one block in one forward pass.

    positions: int32[batch, length], absolute position of each token within its document.
    segment_ids: int32[batch, length], 0 is padding; None is one document without padding.
    encoder: the position encoder of the block's layers.
    runtime: how to run.
    layer: index of the layer within its segment, which is also its place in a cache.
    rng: key for dropout; None turns it off.
    taps: names of intermediates that the block must return in `aux["taps"]`.
    meta: the step's `model.caches.StepMeta`, with a cache in the carry.
    """

    positions: Array
    segment_ids: Array | None
    encoder: PositionEncoder
    runtime: Runtime
    layer: Any = 0
    rng: Array | None = None
    taps: frozenset[str] = frozenset()
    meta: StepMeta | None = None

    def key(self, name: str) -> Array | None:
        """The key of the dropout that a linear layer's weight may have, by the layer's name."""
        return None if self.rng is None else jax.random.fold_in(self.rng, zlib.crc32(name.encode()))
