"""Empty caches, sized for a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.target import current_target
from model.caches.attend import AXES
from model.caches.dense import Dense
from model.caches.protocol import DecoderCache
from model.caches.rolling import Rolling
from model.config import ModelConfig, Segment
from sharding import Layout, constrain
from weights import nearest

Array = jax.Array


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    *,
    planned_length: Array | int | None = None,
    chunk: int | None = None,
    kind: str | None = None,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
    segments: Sequence[Segment] | None = None,
) -> DecoderCache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    Args:
        config: the model.
        batch: rows.
        capacity: longest sequence, prompt and generated tokens together; on a TPU there may be
            room for some more.
        planned_length: the longest that a row is meant to grow, an int or `int32[]`; None is
            `capacity`. Rotary scalings that depend on the length ("dynamic", "longrope") go by it
            from the first token on, so that stored keys and later queries always agree.
        chunk: most tokens that one step brings; None is `capacity`. Rolling caches are sized by it.
        kind: "dense" or "rolling" for all layers; None rolls where a sliding window makes that
            smaller.
        dtype: of stored keys and values.
        layout: where it lives.
        segments: how the params cut the layers (`segments_of`); None is `config.segments`.
    """
    if kind is not None and kind not in CACHES:
        raise ValueError(f"cache kind {kind!r}; nearest: {nearest(kind, CACHES) or list(CACHES)}")
    caches = {}
    for segment in segments or config.segments:
        name = kind or _smaller(segment, capacity, chunk or capacity)
        caches[segment.name] = CACHES[name](
            segment, batch, capacity, chunk or capacity, dtype, layout
        )
    planned = capacity if planned_length is None else planned_length
    return DecoderCache(caches, jnp.zeros(batch, jnp.int32), jnp.asarray(planned, jnp.int32))


def _smaller(segment: Segment, capacity: int, chunk: int) -> str:
    window = segment.layer.sliding_window
    return "rolling" if window is not None and window + chunk - 1 < capacity else "dense"


def _dense(
    segment: Segment, batch: int, capacity: int, chunk: int, dtype: Any, layout: Layout | None
) -> Dense:
    return Dense(*_arrays(segment, batch, capacity, dtype, layout))


def _rolling(
    segment: Segment, batch: int, capacity: int, chunk: int, dtype: Any, layout: Layout | None
) -> Rolling:
    window = segment.layer.sliding_window
    if window is None:
        raise ValueError(
            f"a rolling cache needs model.sliding_window; layers {segment.name} have none"
        )
    return Rolling(*_arrays(segment, batch, window + chunk - 1, dtype, layout), window=window)


def _arrays(
    segment: Segment, batch: int, slots: int, dtype: Any, layout: Layout | None
) -> tuple[Any, Any]:
    layer = segment.layer
    shape = (len(segment), batch, layer.kv_heads, _whole_blocks(slots), layer.head_dim)
    keys, values = (constrain(jnp.zeros(shape, dtype), AXES, layout) for _ in range(2))
    return keys, values


def _whole_blocks(slots: int) -> int:
    """So many, or on a TPU a twelfth or 15 more, so that the decode kernel finds blocks of a size
    that fits and divides them.
    """
    if current_target().platform != "tpu":
        return slots
    unit = max(16, 1 << (-(-slots // 24) - 1).bit_length())
    return -(-slots // unit) * unit


CACHES: dict[str, Callable[..., Any]] = {"dense": _dense, "rolling": _rolling}
"""Name -> function of (segment, batch, capacity, chunk, dtype, layout) that makes an empty
cache.
"""
