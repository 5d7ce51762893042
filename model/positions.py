"""Where a token stands, as attention sees it: rotary embeddings or ALiBi slopes.

A `PositionEncoder` belongs to the layers of one segment. Attention hands it, with un-rotated
queries and keys, to the cache when there is one, since some caches own positions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.target import current_target
from model.rope import Tables, rotary_tables, rotate

if TYPE_CHECKING:
    from model.config import ModelConfig

Array = jax.Array


@dataclass(frozen=True)
class PositionEncoder:
    """How one segment's attention sees positions.

    config: resolved config of the segment's layers.
    length: of the longest sequence, at hand or planned; None takes it from the positions at hand.
    known: positions whose tables were computed before the layer loop, and the tables.
    """

    config: ModelConfig
    length: Array | int | None = None
    known: tuple[Array, Tables] | None = None

    def prepared(self, positions: Array, *, once: bool = False) -> PositionEncoder:
        """The same encoder with the tables of these positions computed before the layers.

        `once` keeps a CPU from computing them again: for layers that are no loop, XLA fuses the
        cosines into each rotation, and so takes them anew for every head of every layer.
        """
        if self.config.positions != "rope":
            return self
        tables = functools.partial(self._tables, positions)
        if once and positions.size and current_target().platform == "cpu":
            tables = functools.partial(_apart, tables, positions)
        return dataclasses.replace(self, known=(positions, tables()))

    def rotate(self, x: Array, positions: Array) -> Array:
        """Queries or keys `[batch, length, heads, head_dim]` at positions `int32[batch, length]`,
        rotated if RoPE.
        """
        if self.config.positions != "rope":
            return x
        known = self.known is not None and self.known[0] is positions
        tables = self.known[1] if self.known and known else self._tables(positions)
        return rotate(x, tables, self.config.rotary_layout)

    def slopes(self) -> Array | None:
        """ALiBi slopes `float32[num_heads]`, rounded to `alibi_dtype`, times `alibi_scale`; or
        None.

        Falcon also rounds the key's position and its product with the slope to bfloat16, each by up
        to a 256th: nothing up to position 256 where slopes are powers of two (1, 2, 4 or 8 heads).
        Elsewhere its bias steps around ours, which grows evenly with the distance.
        """
        config = self.config
        if config.positions != "alibi":
            return None
        rounded = jnp.asarray(alibi_slopes(config.num_heads)).astype(config.alibi_dtype)
        return rounded.astype(jnp.float32) * config.alibi_scale

    def _tables(self, positions: Array) -> Tables:
        return rotary_tables(positions, self.config, self.length)


def _apart(tables: Callable[[], Tables], positions: Array) -> Tables:
    """`tables()` behind a condition that always holds, across which XLA fuses nothing."""
    shapes = jax.eval_shape(tables)

    def zeros() -> Tables:
        return jax.tree.map(lambda table: jnp.zeros(table.shape, table.dtype), shapes)

    return jax.lax.cond(positions.reshape(-1)[0] > np.iinfo(np.int32).min, tables, zeros)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """`float32[num_heads]`: `2 ** (-8 i / n)` for i = 1..n where n is a power of two (Press et al.
    2022).

    Otherwise the slopes of the power of two below, then every second slope of the one above, as
    BLOOM does.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    slopes += [2.0 ** (-4.0 * i / below) for i in range(1, 2 * below, 2)]
    return np.asarray(slopes[:num_heads], np.float32)
