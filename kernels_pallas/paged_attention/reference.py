"""Ragged paged attention in plain `jax.numpy`: the definition that every kernel must match, and
what runs on a CPU.

Keys and values lie in pages, `[layers, pages, page_size, 2 * kv_heads, head_dim]`, keys in the even
rows and values in the odd ones. Row s of the page table lists the pages of sequence s; its width
bounds what is read, so a caller cuts it to its longest sequence.

A step is one flat list of tokens: sequence s owns tokens `cu_q_lens[s]` to `cu_q_lens[s + 1]`, the
newest of its `kv_lens[s]`. One with a single token decodes, others are prompts or pieces of them.
Decoding sequences are computed some at a time, the others tile by tile.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.reference import attend, see
from kernels_pallas.decode_attention.softmax import Softmax, check_softmax

Array = jax.Array
TILE = 64
"""Tokens of a prompt that are computed at a time."""
GATHERED_BYTES = 2 << 20
"""Pages of decoding sequences that are gathered at a time: about what a processor's cache holds."""


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
) -> Any:
    """Attention of a step's tokens to the pages of their sequences.

    Args:
        q: `[tokens, heads, head_dim]`; `heads` must be a multiple of `kv_heads`.
        pages: `[pages, page_size, 2 * kv_heads, head_dim]`, or with a leading layer axis. What lies
            beyond a sequence's length is never read, NaN included.
        page_table: `int32[sequences, width]`, page numbers; unused entries are any valid ones.
        kv_lens: `int32[sequences]`, tokens of each sequence, the step's own among them.
        cu_q_lens: `int32[sequences + 1]`, first token of each sequence; entries of sequences that
            are not there repeat the last.
        layer: the layer of `pages`, an int or `int32[]`; None if there is no such axis.
        causal: tokens after the query are hidden. Without, every token of the sequence is seen.
        window: distances 0..window-1 are seen.
        sinks: so many of the first tokens are seen from any distance.
        soft_cap, alibi_slopes, scale, softmax: see `decode_attention`.
        max_query_length: most tokens of one sequence in this step; 1 for a step that only decodes.
            None is all of them.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        `[tokens, heads, head_dim]` in `q.dtype`, and with `return_lse` also `float32[tokens,
        heads]`. Tokens of no sequence, and tokens that see nothing, give 0 and `-inf`.
    """
    check(q, pages, page_table, kv_lens, cu_q_lens, layer, softmax, causal, window, alibi_slopes)
    if layer is None:
        pages, layer = pages[None], 0
    options = {"soft_cap": soft_cap, "alibi_slopes": alibi_slopes, "scale": scale}
    options["softmax"] = softmax
    masks = {"causal": causal, "window": window, "sinks": sinks}
    out = jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    call = (q, pages, layer, page_table, kv_lens, cu_q_lens)
    out = _decode(out, *call, masks, options)
    if max_query_length != 1:
        out = _prefill(out, *call, masks, options, min(TILE, max_query_length or TILE))
    return out if return_lse else out[0]


def _decode(
    out: tuple[Array, Array],
    q: Array,
    pages: Array,
    layer: Any,
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    masks: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """The sequences of one token, as many at a time as `GATHERED_BYTES` hold."""
    starts = cu_q_lens[:-1]
    mine = cu_q_lens[1:] - starts == 1
    rows = jnp.where(mine, starts, q.shape[0])

    def some(arrays: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        q, table, lengths, positions = arrays

        def attended() -> tuple[Array, Array]:
            return _attend(q, _gather(pages, layer, table), lengths, positions, masks, options)

        def nothing() -> tuple[Array, Array]:
            return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)

        # Beside prompts few decode: whole groups have none that does.
        return jax.lax.cond(jnp.any(lengths > 0), attended, nothing)

    queries = jnp.take(q, rows, axis=0, mode="clip")[:, None]
    arrays = (queries, page_table, jnp.where(mine, kv_lens, 0), (kv_lens - 1)[:, None])
    page_bytes = math.prod(pages.shape[2:]) * pages.dtype.itemsize
    size = _group(len(page_table), GATHERED_BYTES // (page_table.shape[1] * page_bytes))
    if size == len(page_table):
        part = some(arrays)
    else:
        grouped = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
        part = jax.lax.map(some, grouped)
        part = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part)
    return jax.tree.map(lambda x, new: x.at[rows].set(new[:, 0], mode="drop"), out, part)


def _prefill(
    out: tuple[Array, Array],
    q: Array,
    pages: Array,
    layer: Any,
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    masks: dict[str, Any],
    options: dict[str, Any],
    tile: int,
) -> tuple[Array, Array]:
    """The sequences of more tokens, a tile of one of them at a time."""
    count = cu_q_lens[1:] - cu_q_lens[:-1]
    tiles = jnp.where(count > 1, (count + tile - 1) // tile, 0)
    stops = jnp.cumsum(tiles)
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, tile),) + ((0, 0),) * (x.ndim - 1)), out)

    def body(index: Array, padded: tuple[Array, Array]) -> tuple[Array, Array]:
        s = jnp.searchsorted(stops, index, side="right")
        first = cu_q_lens[s] + (index - stops[s] + tiles[s]) * tile
        token = first + jnp.arange(tile, dtype=jnp.int32)
        part = _attend(
            jax.lax.dynamic_slice_in_dim(q, first, tile)[None],
            _gather(pages, layer, page_table[s])[None],
            kv_lens[s][None],
            (token + kv_lens[s] - cu_q_lens[s + 1])[None],
            masks,
            options,
        )
        mine = token < cu_q_lens[s + 1]
        return jax.tree.map(lambda x, new: _put(x, new[0], mine, first), padded, part)

    padded = jax.lax.fori_loop(0, stops[-1], body, padded)
    return jax.tree.map(lambda x: x[: len(x) - tile], padded)


def _gather(pages: Array, layer: Any, page_table: Array) -> Array:
    """The pages of a table, each copied as one row: an index for each of its elements is slow."""
    rows = pages.reshape(pages.shape[0] * pages.shape[1], -1)
    found = jnp.take(rows, layer * pages.shape[1] + page_table, axis=0, mode="clip")
    return found.reshape(*page_table.shape, *pages.shape[2:])


def _group(count: int, most: int) -> int:
    """The largest size of equal groups of `count`, at most `most`."""
    return next(size for size in range(max(min(count, most), 1), 0, -1) if count % size == 0)


def _put(x: Array, new: Array, mine: Array, first: Array) -> Array:
    """Write the rows of a tile that are `mine` to x, from `first` on."""
    old = jax.lax.dynamic_slice_in_dim(x, first, len(new))
    mine = mine.reshape(-1, *(1,) * (new.ndim - 1))
    return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(mine, new, old), first, 0)


def _attend(
    q: Array,
    pages: Array,
    lengths: Array,
    query_positions: Array,
    masks: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """q `[n, queries, heads, dim]` to gathered pages `[n, width, page_size, 2 * kv_heads, dim]`."""
    n, width, size, rows, dim = pages.shape
    pages = pages.reshape(n, width * size, rows // 2, 2, dim)
    slot = jnp.arange(width * size, dtype=jnp.int32)
    used = slot < lengths[:, None]
    pages = jnp.where(used[:, :, None, None, None], pages, 0)
    keys, values = (jnp.swapaxes(pages[:, :, :, which], 1, 2) for which in (0, 1))
    distance = query_positions[:, :, None] - slot
    visible = used[:, None, :]
    if masks["causal"]:
        visible = visible & see(distance, slot, masks["window"], masks["sinks"])
    return attend(q, keys, values, distance, visible, **options)


def check(
    q: Array,
    pages: Array,
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    layer: Any,
    softmax: Softmax,
    causal: bool,
    window: int | None,
    alibi_slopes: Array | None,
) -> None:
    """Raises `ValueError` that names the argument and what would be right."""
    lead = 0 if layer is None else 1
    if q.ndim != 3 or pages.ndim != 4 + lead or q.shape[-1] != pages.shape[-1]:
        raise ValueError(
            "paged_attention takes q [tokens, heads, dim] and pages [pages, page_size, 2 * kv_heads"
            f", dim]{', with a leading layer axis' if lead else ''}; got q {q.shape}, pages "
            f"{pages.shape}, layer {'None' if layer is None else 'given'}"
        )
    kv_heads, odd = divmod(pages.shape[-2], 2)
    if odd or q.shape[1] % kv_heads:
        raise ValueError(
            f"pages {pages.shape} hold {pages.shape[-2]} rows a token, a key and a value for each "
            f"kv head; {q.shape[1]} query heads must be a multiple of the kv heads"
        )
    sequences = page_table.shape[0]
    if kv_lens.shape != (sequences,) or cu_q_lens.shape != (sequences + 1,):
        raise ValueError(
            f"page_table {page_table.shape} lists {sequences} sequences; kv_lens {kv_lens.shape} "
            f"must be [{sequences}] and cu_q_lens {cu_q_lens.shape} [{sequences + 1}]"
        )
    if not causal and (window is not None or alibi_slopes is not None):
        raise ValueError(
            "causal=False knows no distances: neither window nor alibi_slopes go with it"
        )
    check_softmax(softmax, q.shape[1])
