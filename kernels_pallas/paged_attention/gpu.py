"""Ragged paged attention on a Hopper GPU: pages stream from memory (`stream_gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.decode_attention.gpu import (
    attend_tiles,
    device_obstacle,
    padded_rows,
    rows_obstacle,
    splits_for,
)
from kernels_pallas.decode_attention.softmax import Softmax, Unified
from kernels_pallas.decode_attention.stream import Items, Masking, Place
from kernels_pallas.decode_attention.stream_gpu import KEYS, ROWS
from kernels_pallas.decode_attention.work import masking_of
from kernels_pallas.paged_attention.ragged import ragged_attention
from kernels_pallas.target import Target

Array = jax.Array


@dataclass(frozen=True)
class PagedSource:
    """Pages `[layers, pages, page_size, 2 * kv_heads, dim]`, keys in the even and values in the odd
    rows.
    """

    page_size: int

    @property
    def copies(self) -> int:
        """See `stream_gpu.Source`."""
        return max(1, KEYS // self.page_size)

    def start(
        self, copy: Callable[[Any, Any], None], array: Any, which: int, slot: Any, head: Any,
        at: Place,
    ) -> None:  # fmt: skip
        """See `stream_gpu.Source`; beyond the last page, which is masked, it is the last again."""
        size = min(self.page_size, KEYS)
        last = jnp.maximum(at.length - 1, 0) // self.page_size
        for piece in range(self.copies):
            token = at.block * KEYS + piece * size
            page = at.table[at.sequence, jnp.minimum(token // self.page_size, last)]
            rows = pl.ds(token % self.page_size, size)
            source = array.at[at.layer, page, rows, 2 * head + which]
            copy(source, slot.at[pl.ds(piece * size, size)])


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
    splits: int | None = None,
    tile: int | None = None,
    simulate: bool = False,
    **options: Any,
) -> Any:
    """See `reference.paged_attention`. splits: parts that each tile's keys are cut into. tile:
    tokens of a prompt that are computed at a time.
    """
    if layer is None:
        pages, layer = pages[None], 0
    _, _, size, pairs, dim = pages.shape
    kv_heads, group = pairs // 2, 2 * q.shape[1] // pairs
    blocks = -(-page_table.shape[1] * size // KEYS)

    def masking(tokens: int) -> Masking:
        tiles = len(page_table) if tokens == 1 else -(-len(q) // tokens)
        parts = splits or splits_for(target, tiles * kv_heads, blocks)
        shared = {"softmax": softmax, "alibi_slopes": alibi_slopes, "head_dim": dim}
        shared["splits"] = parts
        return masking_of(tokens, group, padded_rows(tokens * group), **shared, **options)

    def run(q: Array, items: Items, count: Array, masking: Masking) -> tuple[Array, Array]:
        return attend_tiles(
            q,
            (pages,),
            items,
            count,
            masking,
            PagedSource(size),
            kv_heads=kv_heads,
            alibi_slopes=alibi_slopes,
            softmax=softmax,
            layer=layer,
            table=page_table,
            simulate=simulate,
        )

    rows = ROWS if isinstance(softmax, Unified) else 2 * ROWS
    tile = None if max_query_length == 1 else max(2, tile or rows // group)
    out = ragged_attention(run, KEYS, masking, q, kv_lens, cu_q_lens, tile)
    return out if return_lse else out[0]


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, pages = arguments["q"], arguments["pages"]
    size, group = pages.shape[-3], 2 * q.shape[1] // pages.shape[-2]
    if size % 8 or (KEYS % size and size % KEYS):
        return f"pages of {size} tokens; the GPU kernel takes 8, 16, 32 or a multiple of {KEYS}"
    least = 1 if options["max_query_length"] == 1 else 2
    return device_obstacle(target, q, pages) or rows_obstacle(least * group, "softmax" in arguments)
