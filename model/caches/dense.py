"""The dense cache: one slot for each position, keys rotated as they are written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.target import current_target
from model.caches.attend import attend
from model.caches.protocol import StepMeta
from model.positions import PositionEncoder

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """Keys and values `[layers, batch, kv_heads, slots, head_dim]`; position p of a row is in slot
    p.

    Tokens beyond the last slot are not stored, so size it for the whole sequence.
    """

    keys: Array
    values: Array

    def append(
        self, layer: Any, k: Array, v: Array, meta: StepMeta, encoder: PositionEncoder
    ) -> Dense:
        """See `Cache.append`."""
        slots = jnp.where(meta.valid, meta.positions, self.keys.shape[3])
        k = encoder.rotate(k, meta.positions)
        return dataclasses.replace(
            self, keys=write(self.keys, layer, slots, k), values=write(self.values, layer, slots, v)
        )

    def attend(
        self, layer: Any, q: Array, meta: StepMeta, encoder: PositionEncoder, **options: Any
    ) -> Any:
        """See `Cache.attend`. Slots not yet written lie after the query, so causality hides
        them.
        """
        slots = jnp.arange(self.keys.shape[3], dtype=jnp.int32)
        key_positions = jnp.broadcast_to(slots, (q.shape[0], len(slots)))
        options["alibi_slopes"] = encoder.slopes()
        q = encoder.rotate(q, meta.positions)
        return attend(self.keys, self.values, layer, q, meta, key_positions, **options)


def write(store: Array, layer: Any, slots: Array, x: Array) -> Array:
    """`[layers, batch, kv_heads, slots, dim]` with x `[batch, length, kv_heads, dim]` at slots
    `[batch, length]`.

    Slots out of range are dropped.
    """
    x = x.astype(store.dtype)
    rows = jnp.arange(x.shape[0])[:, None]
    if current_target().platform == "tpu":
        # For all heads at once a TPU would turn the whole cache around, layer by layer.
        heads = jnp.arange(x.shape[2])
        return store.at[layer, rows[..., None], heads, slots[..., None]].set(x, mode="drop")
    if x.shape[1] == 1 and store.dtype == jnp.bfloat16:
        here = (jnp.arange(store.shape[3]) == slots)[:, None, :, None]
        return store.at[layer].set(jnp.where(here, jnp.swapaxes(x, 1, 2), store[layer]))
    if slots.size == 1:
        # One write would become an update of a slice, fused into each user, each with a copy.
        slots, x = jnp.repeat(slots, 2, axis=1), jnp.repeat(x, 2, axis=1)
    return store.at[layer, rows, :, slots].set(x, mode="drop")
