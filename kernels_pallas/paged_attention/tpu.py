"""Ragged paged attention on a TPU: pages stream from memory (`decode_attention.stream`).

A step may hold both kinds of sequences. Those with one query go through tiles of one token, those
with more (prompts, chunks of them) through tiles of many, each in a call of its own.
"""

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
from kernels_pallas.decode_attention.stream_tpu import stream_attention
from kernels_pallas.decode_attention.tpu import (
    dot,
    padded_rows,
    per_row,
    rows_obstacle,
    seen_blocks,
    stack_rows,
    types_obstacle,
    unstack_rows,
    vmem_for,
)
from kernels_pallas.paged_attention import cost
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
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    max_query_length: int | None = None,
    return_lse: bool = False,
    target: Target | None = None,
    block_pages: int | None = None,
    tile: int | None = None,
    interpret: Any = False,
) -> Any:
    """See `reference.paged_attention`. block_pages: pages read at a time. tile: tokens of a prompt
    that are computed at a time.
    """
    if layer is None:
        pages, layer = pages[None], 0
    _, _, size, pairs, dim = pages.shape
    heads, kv_heads = q.shape[1], pairs // 2
    prompts, width = max_query_length != 1, page_table.shape[1]
    key = tuning_key(
        tokens=len(q),
        sequences=len(kv_lens),
        length=width * size,
        page_size=size,
        heads=heads,
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
    call = RaggedCall(
        InterleavedBlocks(count, size, kv_heads, dim, pages.dtype),
        dim**-0.5 if scale is None else scale,
        causal,
        window,
        sinks,
        soft_cap,
        alibi_slopes,
        softmax,
        target,
        interpret,
    )
    given = (q, (pages,), layer, page_table, kv_lens, cu_q_lens)
    out = jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    out = call.decode(out, *given)
    if prompts:
        rows = sizes["tile_rows"] // (2 if isinstance(softmax, Unified) else 1)
        tokens = tile or tile_of(heads // kv_heads, kv_heads, rows, max_query_length or len(q))
        out = call.prefill(out, *given, tokens)
    return out if return_lse else out[0]


@dataclass(frozen=True)
class RaggedCall:
    """One call's options, and its two passes over a step's tokens."""

    blocks: Any
    scale: float
    causal: bool
    window: int | None
    sinks: int
    soft_cap: float | None
    alibi_slopes: Array | None
    softmax: Softmax
    target: Target | None
    interpret: Any

    def decode(
        self,
        out: tuple[Array, Array],
        q: Array,
        arrays: Sequence[Array],
        layer: Any,
        page_table: Array,
        kv_lens: Array,
        cu_q_lens: Array,
    ) -> tuple[Array, Array]:
        """The sequences of one token, a tile each; the others' items are left to the end."""
        starts, mine = cu_q_lens[:-1], cu_q_lens[1:] - cu_q_lens[:-1] == 1
        order = jnp.argsort(~mine, stable=True)
        rows = jnp.where(mine, starts, len(q))[order]
        number = jnp.arange(len(order), dtype=jnp.int32)
        masking = self._masking(q, 1)
        lengths = kv_lens[order]
        stop = jnp.maximum(-(-lengths // self.blocks.keys), 1)
        first, sinks = seen_blocks(lengths - (self.window or 0), stop, self.blocks.keys, masking)
        one = jnp.ones_like(number)
        items = Items(
            number,
            order.astype(jnp.int32),
            first,
            sinks,
            sinks + stop - first,
            number,
            number + 1,
            lengths - 1 - number,
            lengths,
            one,
            one,
        )
        taken = jnp.take(q, rows, axis=0, mode="clip")[:, None]
        count = jnp.sum(mine, dtype=jnp.int32)
        part = self._stream(taken, arrays, layer, page_table, items, count, masking)
        return jax.tree.map(lambda x, new: x.at[rows].set(new[:, 0], mode="drop"), out, part)

    def prefill(
        self,
        out: tuple[Array, Array],
        q: Array,
        arrays: Sequence[Array],
        layer: Any,
        page_table: Array,
        kv_lens: Array,
        cu_q_lens: Array,
        tokens: int,
    ) -> tuple[Array, Array]:
        """The sequences of more tokens, in tiles of the flat order, which sequences may share."""
        masking = self._masking(q, tokens)
        starts, ends = cu_q_lens[:-1], cu_q_lens[1:]
        mine = ends - starts > 1
        tiles = -(-len(q) // tokens)
        items, count = ragged_items(starts, ends, kv_lens, mine, tiles, self.blocks.keys, masking)
        padded = jnp.pad(q, ((0, tiles * tokens - len(q)), (0, 0), (0, 0)))
        padded = padded.reshape(tiles, tokens, *q.shape[1:])
        part = self._stream(padded, arrays, layer, page_table, items, count, masking)
        part = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(q)], part)
        token = jnp.arange(len(q), dtype=jnp.int32)
        owner = jnp.searchsorted(ends, token, side="right")
        chosen = mine[jnp.minimum(owner, len(mine) - 1)] & (token < ends[-1])
        return jax.tree.map(
            lambda x, new: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), new, x), out, part
        )

    def _masking(self, q: Array, tokens: int) -> Masking:
        group = q.shape[1] // self.blocks.kv_heads
        softmax = self.softmax
        return Masking(
            tokens,
            group,
            padded_rows(tokens * group, q.dtype),
            self.scale,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            soft_cap=self.soft_cap,
            unified=(softmax.low, softmax.high) if isinstance(softmax, Unified) else None,
            alibi=self.alibi_slopes is not None,
            return_lse=True,
        )

    def _stream(
        self,
        q: Array,
        arrays: Sequence[Array],
        layer: Any,
        page_table: Array,
        items: Items,
        count: Array,
        masking: Masking,
    ) -> tuple[Array, Array]:
        """q `[tiles, tokens, heads, dim]`."""
        blocks = self.blocks
        phi = self.softmax.phi if isinstance(self.softmax, Unified) else None
        per = (masking.tokens, blocks.kv_heads, masking.rows)
        out, lse = stream_attention(
            stack_rows(q, blocks.kv_heads, masking.rows),
            arrays,
            items,
            count,
            masking=masking,
            blocks=blocks,
            layer=layer,
            table=page_table,
            slopes=per_row(self.alibi_slopes, *per),
            phi=per_row(phi, *per),
            vmem_bytes=vmem_for(self.target),
            cost=estimate(
                *cost.paged_attention(
                    q.reshape(-1, *q.shape[2:]),
                    arrays[0],
                    cached_tokens=page_table.size * blocks.page_size,
                )
            ),
            interpret=self.interpret,
        )
        assert lse is not None
        out = unstack_rows(out, masking.tokens, masking.group)
        return out, unstack_rows(lse[..., :1], masking.tokens, masking.group)[..., 0]


def ragged_items(
    starts: Array,
    ends: Array,
    kv_lens: Array,
    mine: Array,
    tiles: int,
    keys: int,
    masking: Masking,
) -> tuple[Items, Array]:
    """An item for each tile of tokens and each of the sequences that are `mine` within it."""
    tokens = masking.tokens
    first_tile = starts // tokens
    number = jnp.where(mine, (ends - 1) // tokens - first_tile + 1, 0)
    stops = jnp.cumsum(number)
    item = jnp.arange(tiles + len(starts), dtype=jnp.int32)
    s = jnp.minimum(jnp.searchsorted(stops, item, side="right"), len(starts) - 1)
    tile = first_tile[s] + item - (stops[s] - number[s])
    shift = (kv_lens - ends)[s]
    last = jnp.minimum(ends[s], (tile + 1) * tokens) - 1 + shift
    needed = jnp.minimum(kv_lens[s], last + 1) if masking.causal else kv_lens[s]
    stop = jnp.maximum(-(-needed // keys), 1)
    oldest = jnp.maximum(starts[s], tile * tokens) + shift - (masking.window or 0) + 1
    first, sinks = seen_blocks(oldest, stop, keys, masking)
    before = jnp.roll(tile, 1).at[0].set(-1)
    after = jnp.where(item + 1 < stops[-1], jnp.roll(tile, -1), -1)
    items = Items(
        tile,
        s.astype(jnp.int32),
        first,
        sinks,
        sinks + stop - first,
        starts[s],
        ends[s],
        shift,
        kv_lens[s],
        (tile != before).astype(jnp.int32),
        (tile != after).astype(jnp.int32),
    )
    return items, stops[-1]


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
