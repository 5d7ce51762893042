"""Decode attention on a Hopper GPU: blocks of the cache stream from memory (`stream_gpu`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention.reference import merge
from kernels_pallas.decode_attention.softmax import Softmax, Unified
from kernels_pallas.decode_attention.stream import Items, Masking, Place
from kernels_pallas.decode_attention.stream_gpu import KEYS, ROWS, Source, stream_attention
from kernels_pallas.decode_attention.work import (
    dealt_items,
    masking_of,
    per_row,
    sequence_items,
    stack_rows,
    unstack_rows,
)
from kernels_pallas.gpu_topology import GPUS, gpu_of
from kernels_pallas.target import Target

Array = jax.Array


@dataclass(frozen=True)
class DenseSource:
    """Keys and values `[layers, batch, kv_heads, slots, dim]`."""

    copies: int = 1

    def start(
        self, copy: Callable[[Any, Any], None], array: Any, which: int, slot: Any, head: Any,
        at: Place,
    ) -> None:  # fmt: skip
        """See `stream_gpu.Source`."""
        del which
        copy(array.at[at.layer, at.sequence, head, pl.ds(at.block * KEYS, KEYS)], slot)


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
    alibi_slopes: Array | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
    target: Target | None = None,
    splits: int | None = None,
    simulate: bool = False,
    **options: Any,
) -> Any:
    """See `reference.decode_attention`. splits: parts of each sequence's keys; None chooses."""
    if layer is None:
        k, v, layer = k[None], v[None], 0
    batch, queries, heads, head_dim = q.shape
    kv_heads, slots = k.shape[2:4]
    seen = slots if window is None else min(slots, window + queries + sinks)
    masking = masking_of(
        queries,
        heads // kv_heads,
        padded_rows(queries * heads // kv_heads),
        head_dim=head_dim,
        window=window,
        sinks=sinks,
        ring=slots if rolling else None,
        softmax=softmax,
        alibi_slopes=alibi_slopes,
        splits=splits or splits_for(target, batch * kv_heads, -(-seen // KEYS)),
        **options,
    )
    out, lse = attend_tiles(
        q,
        (k, v),
        sequence_items(lengths, lengths - queries, slots, KEYS, masking),
        jnp.int32(batch),
        masking,
        DenseSource(),
        kv_heads=kv_heads,
        alibi_slopes=alibi_slopes,
        softmax=softmax,
        layer=layer,
        simulate=simulate,
    )
    return (out, lse) if return_lse else out


def attend_tiles(
    q: Array,
    arrays: Sequence[Array],
    items: Items,
    count: Array,
    masking: Masking,
    source: Source,
    *,
    kv_heads: int,
    alibi_slopes: Array | None,
    softmax: Softmax,
    **options: Any,
) -> tuple[Array, Array]:
    """`stream_attention` of tiles `[tiles, tokens, heads, dim]`, with their splits merged; out is
    like q, the log-sum-exp `[tiles, tokens, heads]`.
    """
    splits = masking.splits
    items, first = dealt_items(items, count, len(q), splits)
    phi = softmax.phi if isinstance(softmax, Unified) else None
    slopes, phi = (
        None if x is None else per_row(x, masking.tokens, kv_heads, masking.rows)
        for x in (alibi_slopes, phi)
    )
    found = stream_attention(
        stack_rows(q, kv_heads, masking.rows),
        arrays,
        items,
        first,
        masking=masking,
        source=source,
        slopes=slopes,
        phi=phi,
        **options,
    )
    if splits > 1:
        parts = (jnp.moveaxis(x.reshape(-1, splits, *x.shape[1:]), 1, 0) for x in found)
        found = merge(*(list(x) for x in parts))
    out, lse = (unstack_rows(x, masking.tokens, masking.group) for x in found)
    return out, lse


def padded_rows(rows: int) -> int:
    """A multiple of 8, the rows of one tile in shared memory."""
    return -(-rows // 8) * 8


def splits_for(target: Target | None, blocks_of_threads: int, keys: int) -> int:
    """Parts of each sequence that leave the fewest processors idle, of at least 4 blocks each.

    A thread block fills a processor's shared memory, so the blocks run in waves; each part more is
    taken to cost 2 %, for its start and for merging.

    Args:
        target: the GPU.
        blocks_of_threads: that there are without splitting.
        keys: blocks of keys of the longest sequence.
    """
    name = gpu_of(target.device_kind) if target is not None else None
    processors = GPUS[name or "h100"].processors
    most = max(1, min(keys // 4, max(8, -(-2 * processors // blocks_of_threads))))
    waves = {n: -(-blocks_of_threads * n // processors) / n for n in range(1, most + 1)}
    return min(waves, key=lambda n: waves[n] * (1 + 0.02 * n))


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, k, v = (arguments[name] for name in "qkv")
    rows, slots = q.shape[1] * q.shape[2] // k.shape[-3], k.shape[-2]
    if slots < KEYS or slots % 8:
        return f"{slots} slots; the GPU kernel takes a multiple of 8, and no less than {KEYS}"
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
