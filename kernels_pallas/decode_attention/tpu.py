"""Decode attention on a TPU: blocks of the cache stream from memory (`stream`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.decode_attention import cost
from kernels_pallas.decode_attention.softmax import Softmax, Unified
from kernels_pallas.decode_attention.stream import Blocks, Items, Masking, Place
from kernels_pallas.decode_attention.stream_tpu import stream_attention
from kernels_pallas.decode_attention.work import (
    masking_of,
    per_row,
    sequence_items,
    stack_rows,
    unstack_rows,
)
from kernels_pallas.target import Target
from kernels_pallas.tpu_topology import GENERATIONS
from kernels_pallas.tuning import Key, best

Array = jax.Array
MOST_ROWS = 2048
"""Rows of queries of all kv heads in a tile: their sums wait in on-chip memory."""
BLOCK_BYTES = 2**21
"""Keys and values that are read at a time, where nothing was measured."""
CLEANED = 32
"""Keys that are made finite at a time: a whole tile of any type."""


@dataclass(frozen=True)
class DenseBlocks:
    """Keys and values `[layers, batch, kv_heads, slots, dim]`, `keys` slots at a time."""

    keys: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: Any

    def buffers(self) -> Sequence[tuple[tuple[int, ...], Any]]:
        """See `stream.Blocks`."""
        lead = (self.kv_heads, self.keys)
        return [((*lead, self.head_dim), self.dtype), ((*lead, self.value_dim), self.dtype)]

    def visit(self, copy: Callable[[Any, Any], None], arrays: Any, buffers: Any, at: Place) -> None:
        """See `stream.Blocks`."""
        slots = pl.ds(pl.multiple_of(at.block * self.keys, self.keys), self.keys)
        for array, buffer in zip(arrays, buffers, strict=True):
            copy(array.at[at.layer, at.sequence, :, slots, :], buffer)

    def clean(self, buffers: Any, valid: Any) -> None:
        """See `stream.Blocks`; keys need it no more than their scores, which are hidden."""
        chunk = CLEANED if self.keys % CLEANED == 0 else self.keys

        def body(index: Any, _: Any) -> Any:
            rows = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)
            shape = (self.kv_heads, chunk, self.value_dim)
            slot = index * chunk + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            old = buffers[1][:, rows, :].astype(jnp.float32)
            buffers[1][:, rows, :] = jnp.where(slot < valid, old, 0).astype(self.dtype)
            return 0

        jax.lax.fori_loop(jnp.maximum(valid, 0) // chunk, self.keys // chunk, body, 0)

    def scores(self, q: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        return dot(q, buffers[0][head], 1)

    def values(self, weights: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        return dot(weights.astype(self.dtype), buffers[1][head], 0)


def dot(a: Array, b: Array, over: int) -> Array:
    """`a [m, k]` times `b [k, n]` (over 0) or `b [n, k]` (over 1), in float32; exact products."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (over,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


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
    block: int | None = None,
    interpret: Any = False,
    **options: Any,
) -> Any:
    """See `reference.decode_attention`. block: slots read at a time, which must divide them; None
    chooses.
    """
    if layer is None:
        k, v, layer = k[None], v[None], 0
    batch, queries, heads, head_dim = q.shape
    kv_heads, slots = k.shape[2:4]
    seen = slots if window is None else min(slots, window + queries + sinks)
    keys = block or measured_block(q, k, v, target)
    group = heads // kv_heads
    masking = masking_of(
        queries,
        group,
        padded_rows(queries * group, q.dtype),
        head_dim=head_dim,
        window=window,
        sinks=sinks,
        ring=slots if rolling else None,
        softmax=softmax,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
        **options,
    )
    out, lse = attend_tiles(
        q,
        (k, v),
        sequence_items(lengths, lengths - queries, slots, keys, masking),
        jnp.int32(batch),
        masking,
        DenseBlocks(keys, kv_heads, head_dim, v.shape[-1], k.dtype),
        alibi_slopes=alibi_slopes,
        softmax=softmax,
        layer=layer,
        cores=cores_for(target, batch),
        vmem_bytes=vmem_for(target),
        cost=cost.estimate(*cost.decode_attention(q, k[0], v[0], tokens=batch * seen)),
        interpret=interpret,
    )
    return (out, lse) if return_lse else out


def attend_tiles(
    q: Array,
    arrays: Sequence[Array],
    items: Items,
    count: Array,
    masking: Masking,
    blocks: Blocks,
    *,
    alibi_slopes: Array | None,
    softmax: Softmax,
    **options: Any,
) -> Any:
    """`stream_attention` of tiles `[tiles, tokens, heads, dim]`; out is like q, the log-sum-exp
    `[tiles, tokens, heads]`, or None.
    """
    phi = softmax.phi if isinstance(softmax, Unified) else None
    slopes, phi = (
        None if x is None else per_row(x, masking.tokens, blocks.kv_heads, masking.rows)
        for x in (alibi_slopes, phi)
    )
    out, lse = stream_attention(
        stack_rows(q, blocks.kv_heads, masking.rows),
        arrays,
        items,
        count,
        masking=masking,
        blocks=blocks,
        slopes=None if slopes is None else slopes[..., None],
        phi=None if phi is None else phi[..., None],
        **options,
    )
    lse = None if lse is None else unstack_rows(lse[..., 0], masking.tokens, masking.group)
    return unstack_rows(out, masking.tokens, masking.group), lse


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, k, v = (arguments[name] for name in "qkv")
    _, queries, heads, head_dim = q.shape
    kv_heads, slots = k.shape[-3:-1]
    if block_of(slots, kv_heads, head_dim + v.shape[-1], k.dtype) is None:
        return (
            f"{slots} slots of {kv_heads} kv heads are too many or too odd for one block, and no "
            "number of slots that fits divides them; make the cache a multiple of 128 long"
        )
    return types_obstacle(q, k, v) or rows_obstacle(queries * heads // kv_heads, kv_heads)


def types_obstacle(*arrays: Any) -> str | None:
    """Why these types are not served; None if they are."""
    kinds = {jnp.dtype(x.dtype) for x in arrays}
    if len(kinds) == 1 and kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return None
    names = ", ".join(sorted(str(kind) for kind in kinds))
    return f"queries and cache are {names}; the TPU kernel takes bfloat16 or float32, both the same"


def rows_obstacle(rows: int, kv_heads: int) -> str | None:
    """Why so many rows a kv head are not served; None if they are."""
    if rows * kv_heads <= MOST_ROWS:
        return None
    return (
        f"{rows * kv_heads} rows of queries a sequence; decoding takes at most {MOST_ROWS}, "
        "attention takes more"
    )


def cores_for(target: Target | None, tiles: int) -> int:
    """Tensor cores that share the tiles: all that the device has, if they divide evenly."""
    if target is None or target.generation is None:
        return 1
    cores = GENERATIONS[target.generation].cores
    return cores if tiles % cores == 0 else 1


def vmem_for(target: Target | None) -> int | None:
    """Limit of on-chip memory; None is the compiler's own."""
    if target is None or target.generation in (None, "v4"):
        return None
    return GENERATIONS[target.generation].vmem_bytes * 3 // 4


def padded_rows(rows: int, dtype: Any) -> int:
    """A whole number of tiles: 8 rows of 32 bits, 16 of 16; few rows stay 8."""
    unit = 8 if rows <= 8 else 8 * 4 // jnp.dtype(dtype).itemsize
    return -(-rows // unit) * unit


def tuning_key(
    *,
    batch: int,
    queries: int,
    slots: int,
    heads: int,
    kv_heads: int,
    dims: int,
    dtype: Any,
    device_kind: str | None,
) -> Key:
    """What the bytes of a block depend on; `dims` of a key and its value."""
    sizes = {"batch": batch, "rows": queries * heads // kv_heads, "slots": slots}
    options = {"kv_heads": kv_heads, "dims": dims}
    return Key.of("decode_attention.tpu", sizes, dtype, device_kind, **options)


def measured_block(q: Array, k: Array, v: Array, target: Target | None) -> int:
    """Slots to read at a time: as was measured, or `block_of`."""
    batch, queries, heads, _ = q.shape
    kv_heads, slots = k.shape[-3:-1]
    dims = k.shape[-1] + v.shape[-1]

    def slots_of(blocks: Mapping[str, Any]) -> int | None:
        return block_of(slots, kv_heads, dims, k.dtype, blocks["block_bytes"])

    key = tuning_key(
        batch=batch,
        queries=queries,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        dims=dims,
        dtype=k.dtype,
        device_kind=target.device_kind if target else None,
    )
    found = best(
        key, {"block_bytes": BLOCK_BYTES}, fits=lambda blocks: slots_of(blocks) is not None
    )
    return slots_of(found) or slots


def block_of(
    slots: int, kv_heads: int, dims: int, dtype: Any, budget: int = BLOCK_BYTES
) -> int | None:
    """Slots to read at a time: as many whole tiles as divide them and keep a block below `budget`
    bytes, or all of them if no number does and they are few; else None. The compiler copies no
    part of a tile of 16-bit numbers, so there all of them are a multiple of 8.
    """
    item = jnp.dtype(dtype).itemsize
    unit, slot = 8 * 4 // item, kv_heads * dims * item
    most = budget // slot
    fitting = [n for n in range(unit, most + 1, unit) if slots % n == 0 and n >= most // 8]
    if slots > most and fitting:
        return max(fitting)
    return slots if slots <= 3 * most and (item == 4 or slots % 8 == 0) else None
