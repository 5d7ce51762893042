"""Decode attention on a Hopper GPU: blocks of the cache stream from memory (`stream_gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention.reference import merge
from kernels_pallas.decode_attention.softmax import Softmax, Unified
from kernels_pallas.decode_attention.stream import Items, Masking, Place
from kernels_pallas.decode_attention.stream_gpu import KEYS, ROWS, stream_attention
from kernels_pallas.decode_attention.tpu import dense_items, stack_rows, unstack_rows
from kernels_pallas.gpu_topology import GPUS, gpu_of
from kernels_pallas.target import Target

Array = jax.Array


@dataclass(frozen=True)
class DenseSource:
    """Keys and values `[layers, batch, kv_heads, slots, dim]`."""

    copies: int = 1

    def start(
        self, copy: Callable[[Any, Any], None], array: Any, which: int, ring: Any, head: Any,
        at: Place,
    ) -> None:  # fmt: skip
        """See `stream_gpu.Source`."""
        copy(array.at[at.layer, at.sequence, head, pl.ds(at.block * KEYS, KEYS)], ring)


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    layer: Any = None,
    window: int | None = None,
    sinks: int = 0,
    rolling: bool = False,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
    target: Target | None = None,
    splits: int | None = None,
    simulate: bool = False,
) -> Any:
    """See `reference.decode_attention`. splits: parts of each sequence's keys; None chooses."""
    if layer is None:
        k, v, layer = k[None], v[None], 0
    batch, queries, heads, head_dim = q.shape
    kv_heads, slots = k.shape[2:4]
    group = heads // kv_heads
    rows = -(-queries * group // 8) * 8
    seen = slots if window is None else min(slots, window + queries + sinks)
    splits = splits or splits_for(target, batch * kv_heads, -(-seen // KEYS))
    masking = Masking(
        queries,
        group,
        rows,
        head_dim**-0.5 if scale is None else scale,
        window=window,
        sinks=sinks,
        ring=slots if rolling else None,
        soft_cap=soft_cap,
        unified=(softmax.low, softmax.high) if isinstance(softmax, Unified) else None,
        alibi=alibi_slopes is not None,
        splits=splits,
    )
    items = split_items(dense_items(lengths, queries, slots, KEYS, masking), splits)
    out, lse = stream_attention(
        stack_rows(q, kv_heads, rows),
        (k, v),
        items,
        jnp.arange(batch * splits + 1, dtype=jnp.int32),
        masking=masking,
        source=DenseSource(),
        layer=layer,
        slopes=per_row(alibi_slopes, queries, kv_heads, rows),
        phi=per_row(softmax.phi if isinstance(softmax, Unified) else None, queries, kv_heads, rows),
        simulate=simulate,
    )
    out, lse = merge_splits(out, lse, splits, queries, group)
    return (out, lse) if return_lse else out


def split_items(items: Items, splits: int) -> Items:
    """Each item as so many neighbours, of equal shares of its blocks; the first has the sinks'."""
    if splits == 1:
        return items
    number = jnp.arange(splits, dtype=jnp.int32)
    share = jnp.maximum(-(-items.blocks // splits), items.sink_blocks)[:, None]
    begin = number * share
    sinks = jnp.where(number == 0, items.sink_blocks[:, None], 0)
    first = items.first[:, None] + jnp.maximum(begin - items.sink_blocks[:, None], 0)
    blocks = jnp.clip(items.blocks[:, None] - begin, 0, share)
    whole = Items(*(jnp.broadcast_to(x[:, None], (len(x), splits)) for x in items))
    parts = whole._replace(first=first, sink_blocks=sinks, blocks=blocks)
    return Items(*(x.reshape(-1) for x in parts))


def merge_splits(
    out: Array, lse: Array, splits: int, tokens: int, group: int
) -> tuple[Array, Array]:
    """`[tiles * splits, kv_heads, rows, dim]` -> `[tiles, tokens, heads, dim]`, and so the
    log-sum-exp.
    """
    if splits > 1:
        parts = (jnp.moveaxis(x.reshape(-1, splits, *x.shape[1:]), 1, 0) for x in (out, lse))
        out, lse = merge(*(list(x) for x in parts))
    return unstack_rows(out, tokens, group), unstack_rows(lse[..., None], tokens, group)[..., 0]


def per_row(values: Array | None, tokens: int, kv_heads: int, rows: int) -> Array | None:
    """`[heads]` -> float32 `[kv_heads, rows]`, as the rows of a tile are stacked."""
    if values is None:
        return None
    each = jnp.broadcast_to(values.astype(jnp.float32)[None, :, None], (tokens, *values.shape, 1))
    return stack_rows(each[None], kv_heads, rows)[0, ..., 0]


def splits_for(target: Target | None, blocks_of_threads: int, keys: int) -> int:
    """Parts of each sequence that leave the fewest processors idle, of at least 4 blocks each.

    Args:
        target: the GPU.
        blocks_of_threads: that there are without splitting.
        keys: blocks of keys of the longest sequence.
    """
    name = gpu_of(target.device_kind) if target is not None else None
    processors = GPUS[name or "h100"].processors
    most = max(1, min(keys // 4, -(-2 * processors // blocks_of_threads)))
    waves = {n: -(-blocks_of_threads * n // processors) / n for n in range(1, most + 1)}
    return min(waves, key=lambda n: waves[n] * (1 + 0.02 * n))


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, k, v = (arguments[name] for name in "qkv")
    rows = q.shape[1] * q.shape[2] // k.shape[-3]
    if k.shape[-1] != v.shape[-1]:
        return f"keys of {k.shape[-1]} and values of {v.shape[-1]} channels; it takes equal ones"
    return device_obstacle(target, q, k, v) or rows_obstacle(rows, "softmax" in arguments)


def device_obstacle(target: Target, q: Any, *cache: Any) -> str | None:
    """Why the device, the types or the sizes are not served; None if they are."""
    if gpu_of(target.device_kind) is None:
        return f"{target.device_kind} is not a Hopper GPU ({', '.join(GPUS)})"
    kinds = {jnp.dtype(x.dtype) for x in (q, *cache)}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        return f"queries and cache are {names}; the GPU kernel takes 16-bit floats, all the same"
    if q.shape[-1] not in (64, 128, 192, 256):
        return f"head_dim {q.shape[-1]} is not 64, 128, 192 or 256"
    return None


def rows_obstacle(rows: int, unified: bool) -> str | None:
    """Why so many rows a kv head are not served; None if they are."""
    most = ROWS if unified else 2 * ROWS
    if rows <= most:
        return None
    return f"{rows} rows of queries for one kv head; the GPU kernel takes {most}"
