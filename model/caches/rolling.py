"""The rolling cache of sliding-window layers: a ring of slots, the oldest overwritten (Mistral 7B,
section 2).

A step of `chunk` tokens writes before it attends, and its first token still sees `window` tokens,
so the ring holds `window + chunk - 1` slots. Memory does not grow with the sequence.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.caches.attend import attend
from model.caches.dense import write
from model.caches.protocol import StepMeta
from model.positions import PositionEncoder

Array = jax.Array
NOWHERE = 1 << 30
"""Position of an empty slot: after every query, so causality hides it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rolling:
    """Keys and values `[layers, batch, kv_heads, slots, head_dim]`; position p is in slot `p %
    slots`.
    """

    keys: Array
    values: Array
    window: int = dataclasses.field(metadata={"static": True})

    def append(
        self, layer: Any, k: Array, v: Array, meta: StepMeta, encoder: PositionEncoder
    ) -> Rolling:
        """See `Cache.append`. Raises `ValueError` for more tokens than the ring was sized for."""
        count = self.keys.shape[3]
        most = count - self.window + 1
        if k.shape[1] > most:
            raise ValueError(
                f"a step of {k.shape[1]} tokens into a rolling cache of {count} slots for a window "
                f"of {self.window}: at most {most} at once; make the cache with a larger chunk"
            )
        slots = jnp.where(meta.valid, meta.positions % count, count)
        k = encoder.rotate(k, meta.positions)
        return dataclasses.replace(
            self, keys=write(self.keys, layer, slots, k), values=write(self.values, layer, slots, v)
        )

    def attend(
        self, layer: Any, q: Array, meta: StepMeta, encoder: PositionEncoder, **options: Any
    ) -> Any:
        """See `Cache.attend`. What a slot holds follows from how many tokens the row has seen."""
        count = self.keys.shape[3]
        last = meta.lengths[:, None] - 1
        held = last - (last - jnp.arange(count, dtype=jnp.int32)[None, :]) % count
        key_positions = jnp.where(held >= 0, held, NOWHERE)
        options |= {"alibi_slopes": encoder.slopes(), "rolling": True}
        q = encoder.rotate(q, meta.positions)
        return attend(self.keys, self.values, layer, q, meta, key_positions, **options)
