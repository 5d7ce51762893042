"""Ragged paged attention on a TPU: pages stream from memory (`decode_attention.stream`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode_attention.cost import estimate
from kernels_pallas.decode_attention.softmax import Softmax, Unified
from kernels_pallas.decode_attention.stream import Items, Masking, Place
from kernels_pallas.decode_attention.tpu import (
    attend_tiles,
    dot,
    padded_rows,
    rows_obstacle,
    types_obstacle,
    vmem_for,
)
from kernels_pallas.decode_attention.work import masking_of
from kernels_pallas.paged_attention import cost
from kernels_pallas.paged_attention.ragged import ragged_attention
from kernels_pallas.target import Target
from kernels_pallas.tuning import Key, best

Array = jax.Array


def visit_pages(
    copy: Callable[[Any, Any], None], arrays: Any, buffers: Any, at: Place, count: int, size: int
) -> None:
    """Copy the pages of a block that hold anything: `array[layer, page]` to `buffer[index]`."""
    first = at.block * count
    held = (at.length + size - 1) // size - first

    def body(index: Any, _: Any) -> Any:
        page = at.table[at.sequence, first + index]
        for array, buffer in zip(arrays, buffers, strict=True):
            copy(array.at[at.layer, page], buffer.at[index])
        return 0

    jax.lax.fori_loop(0, jnp.clip(held, 0, count), body, 0)


@dataclass(frozen=True)
class InterleavedBlocks:
    """Pages `[layers, pages, page_size, 2 * kv_heads, dim]`, keys in the even and values in the odd
    rows; `pages` of them at a time.
    """

    pages: int
    page_size: int
    kv_heads: int
    value_dim: int
    dtype: Any

    @property
    def keys(self) -> int:
        """Tokens in a block."""
        return self.pages * self.page_size

    def buffers(self) -> Sequence[tuple[tuple[int, ...], Any]]:
        """See `stream.Blocks`."""
        return [((self.pages, self.page_size, 2 * self.kv_heads, self.value_dim), self.dtype)]

    def visit(self, copy: Callable[[Any, Any], None], arrays: Any, buffers: Any, at: Place) -> None:
        """See `stream.Blocks`."""
        visit_pages(copy, arrays, buffers, at, self.pages, self.page_size)

    def clean(self, buffers: Any, valid: Any) -> None:
        """See `stream.Blocks`."""
        (buffer,) = buffers
        shape = buffer.shape[1:]

        def body(page: Any, _: Any) -> Any:
            token = page * self.page_size + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            old = buffer[page].astype(jnp.float32)
            buffer[page] = jnp.where(token < valid, old, 0).astype(self.dtype)
            return 0

        jax.lax.fori_loop(jnp.maximum(valid, 0) // self.page_size, self.pages, body, 0)

    def scores(self, q: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        return dot(q, self._half(buffers[0], head, 0), 1)

    def values(self, weights: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        return dot(weights.astype(self.dtype), self._half(buffers[0], head, 1), 0)

    def _half(self, buffer: Any, head: int, which: int) -> Array:
        """Keys (0) or values (1) of one head. Of 16 bits, a 32-bit word holds one of each."""
        if jnp.dtype(self.dtype).itemsize == 4:
            rows = buffer.reshape(self.keys * 2 * self.kv_heads, self.value_dim)
            return rows[pl.ds(2 * head + which, self.keys, stride=2 * self.kv_heads), :]
        words = buffer.bitcast(jnp.uint32).reshape(self.keys * self.kv_heads, self.value_dim)
        word = words[pl.ds(head, self.keys, stride=self.kv_heads), :]
        high = word << 16 if which == 0 else word & jnp.uint32(0xFFFF0000)
        return pltpu.bitcast(high, jnp.float32).astype(self.dtype)


DEFAULT_SIZES = {"block_bytes": 2**21, "block_tokens": 1024, "tile_rows": 2048}
"""Where nothing was measured: most memory and tokens of one buffer of pages, and rows of all kv
heads in a tile of a prompt; as many sums and values wait in on-chip memory.
"""


def paged_attention(
    q: Array,
    pages: Array,
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    *,
    layer: Any = None,
    alibi_slopes: Array | None = None,
    softmax: Softmax = "online",
    max_query_length: int | None = None,
    return_lse: bool = False,
    target: Target | None = None,
    block_pages: int | None = None,
    tile: int | None = None,
    interpret: Any = False,
    **options: Any,
) -> Any:
    """See `reference.paged_attention`. block_pages: pages read at a time. tile: tokens of a prompt
    that are computed at a time.
    """
    if layer is None:
        pages, layer = pages[None], 0
    _, _, size, pairs, dim = pages.shape
    kv_heads, group = pairs // 2, 2 * q.shape[1] // pairs
    prompts, width = max_query_length != 1, page_table.shape[1]
    key = tuning_key(
        tokens=len(q),
        sequences=len(kv_lens),
        length=width * size,
        page_size=size,
        heads=q.shape[1],
        kv_heads=kv_heads,
        head_dim=dim,
        prompts=prompts,
        dtype=pages.dtype,
        device_kind=target.device_kind if target else None,
    )
    sizes = best(key, DEFAULT_SIZES, fits=lambda sizes: min(sizes.values()) > 0)
    token_bytes = pairs * dim * pages.dtype.itemsize
    count = block_pages or pages_of(
        size, token_bytes, width, sizes["block_bytes"], sizes["block_tokens"]
    )
    blocks = InterleavedBlocks(count, size, kv_heads, dim, pages.dtype)

    def masking(tokens: int) -> Masking:
        rows = padded_rows(tokens * group, q.dtype)
        shared = {"softmax": softmax, "alibi_slopes": alibi_slopes, "return_lse": True}
        return masking_of(tokens, group, rows, head_dim=dim, **shared, **options)

    def run(q: Array, items: Items, count: Array, masking: Masking) -> tuple[Array, Array]:
        read = page_table.size * size
        flat = q.reshape(-1, *q.shape[2:])
        return attend_tiles(
            q,
            (pages,),
            items,
            count,
            masking,
            blocks,
            alibi_slopes=alibi_slopes,
            softmax=softmax,
            layer=layer,
            table=page_table,
            vmem_bytes=vmem_for(target),
            cost=estimate(*cost.paged_attention(flat, pages, cached_tokens=read)),
            interpret=interpret,
        )

    tokens = None
    if prompts:
        rows = sizes["tile_rows"] // (2 if isinstance(softmax, Unified) else 1)
        tokens = tile or tile_of(group, kv_heads, rows, max_query_length or len(q))
    out = ragged_attention(run, blocks.keys, masking, q, kv_lens, cu_q_lens, tokens)
    return out if return_lse else out[0]


def tuning_key(
    *,
    tokens: int,
    sequences: int,
    length: int,
    page_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    prompts: bool,
    dtype: Any,
    device_kind: str | None,
) -> Key:
    """What block sizes depend on."""
    sizes = {"tokens": tokens, "sequences": sequences, "length": length}
    options = {"page_size": page_size, "group": heads // kv_heads, "kv_heads": kv_heads}
    options |= {"head_dim": head_dim, "prompts": prompts}
    return Key.of("paged_attention.tpu", sizes, dtype, device_kind, **options)


def pages_of(size: int, token_bytes: int, width: int, most_bytes: int, most_tokens: int) -> int:
    """Pages to read at a time: what the buffer holds, no more than the table is wide."""
    return max(1, min(width, most_bytes // (size * token_bytes), max(1, most_tokens // size)))


def tile_of(group: int, kv_heads: int, rows: int, longest: int) -> int:
    """Tokens of a prompt to compute at a time, a multiple of 16, of about `rows` rows in all."""
    rows = min(512, rows // kv_heads)
    tokens = max(16, min(rows // group, -(-longest // 16) * 16))
    return tokens // 16 * 16


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, pages = arguments["q"], arguments["pages"]
    words = pages.shape[-2] * jnp.dtype(pages.dtype).itemsize // 4
    if words not in (1, 2, 4) and words % 8:
        return (
            f"{pages.shape[-2] // 2} kv heads of {pages.dtype} make {words} words a token and "
            "channel, which is neither 1, 2, 4 nor a multiple of 8"
        )
    return types_obstacle(q, pages) or rows_obstacle(q.shape[1], 1)
