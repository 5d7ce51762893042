"""Decode attention to quantized pages on a TPU: codes stream from memory
(`decode_attention.stream`) and become numbers on the chip.

The scales of values, and those of int8 keys, belong to tokens: they multiply a row of scores or
weights, and the codes, which bfloat16 holds exactly, go to the matrix unit as they are. The scales
of KIVI's keys belong to channels and multiply the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.cost import estimate
from kernels_pallas.decode_attention.softmax import Softmax
from kernels_pallas.decode_attention.stream import Place
from kernels_pallas.decode_attention.tpu import (
    attend_tiles,
    cores_for,
    dot,
    padded_rows,
    rows_obstacle,
    vmem_for,
)
from kernels_pallas.decode_attention.work import masking_of, sequence_items
from kernels_pallas.kv_quant import cost
from kernels_pallas.kv_quant.pages import Int8Pages, KiviPages, QuantizedPages
from kernels_pallas.paged_attention.tpu import visit_pages
from kernels_pallas.target import Target
from kernels_pallas.tuning import Key, best

Array = jax.Array
KEYS = 512
"""Tokens of a block, where nothing was measured."""


@dataclass(frozen=True)
class PagedCodes:
    """What blocks of either kind share: `pages` pages at a time, arrays as they stand in `like`."""

    pages: int
    page_size: int
    kv_heads: int
    value_dim: int
    like: tuple[tuple[tuple[int, ...], Any], ...]
    dtype: Any

    @property
    def keys(self) -> int:
        """Tokens in a block."""
        return self.pages * self.page_size

    def buffers(self) -> Sequence[tuple[tuple[int, ...], Any]]:
        """See `stream.Blocks`."""
        return [((self.pages, *shape), dtype) for shape, dtype in self.like]

    def visit(self, copy: Callable[[Any, Any], None], arrays: Any, buffers: Any, at: Place) -> None:
        """See `stream.Blocks`."""
        visit_pages(copy, arrays, buffers, at, self.pages, self.page_size)

    def clean(self, buffers: Any, valid: Any) -> None:
        """See `stream.Blocks`; codes are finite, so it is the scales of values, with tokens in the
        lanes.
        """
        scales = buffers[3]

        def body(page: Any, _: Any) -> Any:
            old = scales[page].astype(jnp.float32)
            lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, old.ndim - 1)
            kept = jnp.where(page * self.page_size + lane < valid, old, 0)
            scales[page] = kept.astype(scales.dtype)
            return 0

        jax.lax.fori_loop(jnp.maximum(valid, 0) // self.page_size, self.pages, body, 0)

    def _page(self, page: int) -> slice:
        return slice(page * self.page_size, (page + 1) * self.page_size)


@dataclass(frozen=True)
class Int8Blocks(PagedCodes):
    """`Int8Pages`: keys, their scales, values, their scales."""

    def scores(self, q: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        parts = [
            dot(q, buffers[0][page, head].astype(self.dtype), 1) * buffers[1][page, head][None]
            for page in range(self.pages)
        ]
        return jnp.concatenate(parts, axis=1)

    def values(self, weights: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        total = jnp.zeros((len(weights), self.value_dim), jnp.float32)
        for page in range(self.pages):
            scaled = weights[:, self._page(page)] * buffers[3][page, head][None]
            total += dot(scaled.astype(self.dtype), buffers[2][page, head].astype(self.dtype), 0)
        return total


@dataclass(frozen=True)
class KiviBlocks(PagedCodes):
    """`KiviPages`: keys, their scales and zeros, values, theirs."""

    bits: int
    group: int

    def scores(self, q: Array, buffers: Any, head: int) -> Array:
        """See `stream.Blocks`."""
        return jnp.concatenate(
            [dot(q, self._keys(buffers, page, head), 1) for page in range(self.pages)], axis=1
        )

    def values(self, weights: Array, buffers: Any, head: int) -> Array:
        """`sum_t (w_t s_tg) code_td + sum_t w_t z_tg`: one product for the groups g of channels,
        each with scaled weights of its own, of which a channel takes its group's.
        """
        total = jnp.zeros((len(weights), self.value_dim), jnp.float32)
        for page in range(self.pages):
            total += self._page_values(weights[:, self._page(page)], buffers, page, head)
        return total

    def _keys(self, buffers: Any, page: int, head: int) -> Array:
        codes = self._codes(buffers[0], page, head)
        split = codes.reshape(-1, self.group, self.value_dim)
        scale, zero = (buffers[1][page, head, i].astype(jnp.float32)[:, None] for i in (0, 1))
        return (split * scale + zero).reshape(codes.shape).astype(self.dtype)

    def _page_values(self, weights: Array, buffers: Any, page: int, head: int) -> Array:
        rows, groups = len(weights), self.value_dim // self.group
        scale, zero = (buffers[3][page, head, i].astype(jnp.float32) for i in (0, 1))
        scaled = jnp.concatenate([weights * scale[g][None] for g in range(groups)], axis=0)
        codes = self._codes(buffers[2], page, head).astype(self.dtype)
        every = dot(scaled.astype(self.dtype), codes, 0)
        channel = jax.lax.broadcasted_iota(jnp.int32, (rows, self.value_dim), 1)
        total = jnp.zeros((rows, self.value_dim), jnp.float32)
        for g in range(groups):
            of_zeros = jnp.sum(weights * zero[g][None], axis=1, keepdims=True)
            mine = every[g * rows : (g + 1) * rows] + of_zeros
            total = jnp.where(channel // self.group == g, mine, total)
        return total

    def _codes(self, words: Any, page: int, head: int) -> Array:
        """float32 `[page_size, dim]`."""
        packed = words[page, head]
        stretches = [
            (packed >> (self.bits * j)) & (2**self.bits - 1) for j in range(32 // self.bits)
        ]
        return jnp.concatenate(stretches, axis=0).astype(jnp.float32)


def quantized_attention(
    q: Array,
    pages: QuantizedPages,
    page_table: Array,
    lengths: Array,
    *,
    positions: Array | None = None,
    layer: Any = 0,
    alibi_slopes: Array | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
    target: Target | None = None,
    block_pages: int | None = None,
    interpret: Any = False,
    **options: Any,
) -> Any:
    """See `reference.quantized_attention`. block_pages: pages read at a time."""
    batch, queries, heads, head_dim = q.shape
    group = heads // pages.keys.shape[2]
    count = block_pages or measured_pages(q, pages, page_table.shape[1], target)
    blocks = blocks_of(pages, q.dtype, count)
    masking = masking_of(
        queries,
        group,
        padded_rows(queries * group, q.dtype),
        head_dim=head_dim,
        softmax=softmax,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
        **options,
    )
    first = lengths - queries if positions is None else positions
    read = page_table.size * pages.page_size
    out, lse = attend_tiles(
        q,
        arrays_of(pages),
        sequence_items(lengths, first, read, blocks.keys, masking),
        jnp.int32(batch),
        masking,
        blocks,
        alibi_slopes=alibi_slopes,
        softmax=softmax,
        layer=layer,
        table=page_table,
        cores=cores_for(target, batch),
        vmem_bytes=vmem_for(target),
        cost=estimate(*cost.quantized_attention(q, pages, cached_tokens=read)),
        interpret=interpret,
    )
    return (out, lse) if return_lse else out


def arrays_of(pages: QuantizedPages) -> tuple[Array, Array, Array, Array]:
    """Keys, what scales them, values, what scales them."""
    if isinstance(pages, Int8Pages):
        return pages.keys, pages.key_scales, pages.values, pages.value_scales
    return pages.keys, pages.key_grid, pages.values, pages.value_grid


def tuning_key(
    *,
    batch: int,
    queries: int,
    length: int,
    page_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    dtype: Any,
    device_kind: str | None,
) -> Key:
    """What the tokens of a block depend on."""
    sizes = {"batch": batch, "rows": queries * heads // kv_heads, "length": length}
    options = {"page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim, "bits": bits}
    return Key.of("kv_quant.tpu", sizes, dtype, device_kind, **options)


def measured_pages(q: Array, pages: QuantizedPages, width: int, target: Target | None) -> int:
    """Pages to read at a time, no more than the table is wide."""
    batch, queries, heads, head_dim = q.shape
    key = tuning_key(
        batch=batch,
        queries=queries,
        length=width * pages.page_size,
        page_size=pages.page_size,
        heads=heads,
        kv_heads=pages.keys.shape[2],
        head_dim=head_dim,
        bits=pages.bits if isinstance(pages, KiviPages) else 8,
        dtype=q.dtype,
        device_kind=target.device_kind if target else None,
    )
    found = best(key, {"tokens": KEYS}, fits=lambda blocks: blocks["tokens"] > 0)
    return max(1, min(width, found["tokens"] // pages.page_size))


def blocks_of(pages: QuantizedPages, dtype: Any, count: int) -> Int8Blocks | KiviBlocks:
    """How the kernel reads them, `count` at a time."""
    arrays = arrays_of(pages)
    size = pages.page_size
    like = tuple((array.shape[2:], array.dtype) for array in arrays)
    kv_heads, dim = pages.keys.shape[2], pages.keys.shape[-1]
    shared = (count, size, kv_heads, dim, like, dtype)
    if isinstance(pages, KiviPages):
        return KiviBlocks(*shared, pages.bits, pages.group)
    return Int8Blocks(*shared)


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, pages = arguments["q"], arguments["pages"]
    dim, kv_heads = pages.keys.shape[-1], pages.keys.shape[2]
    for name, size in (("page_size", pages.page_size), ("head_dim", dim)):
        if size % 128:
            return f"{name} {size} does not fill the 128 lanes that scales and codes lie in"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries are {q.dtype}; the TPU kernel takes bfloat16 or float32"
    return rows_obstacle(q.shape[1] * q.shape[2] // kv_heads, kv_heads)
