"""How the rows of a tile are stacked, and the list of work that the kernels of `stream` follow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.stream import Items, Masking

Array = jax.Array


def stack_rows(q: Array, kv_heads: int, rows: int) -> Array:
    """`[tiles, tokens, heads, dim]` -> `[tiles, kv_heads, rows, dim]`: tokens and the heads of a kv
    head side by side, padded with zeros.
    """
    tiles, tokens, heads, dim = q.shape
    q = jnp.swapaxes(q.reshape(tiles, tokens, kv_heads, heads // kv_heads, dim), 1, 2)
    q = q.reshape(tiles, kv_heads, -1, dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - q.shape[2]), (0, 0)))


def unstack_rows(out: Array, tokens: int, group: int) -> Array:
    """`[tiles, kv_heads, rows, ...]` -> `[tiles, tokens, heads, ...]`."""
    tiles, kv_heads, _, *rest = out.shape
    out = out[:, :, : tokens * group].reshape(tiles, kv_heads, tokens, group, *rest)
    return jnp.swapaxes(out, 1, 2).reshape(tiles, tokens, kv_heads * group, *rest)


def per_row(values: Array | None, tokens: int, kv_heads: int, rows: int) -> Array | None:
    """`[heads]` -> float32 `[kv_heads, rows]`, as the rows of a tile are stacked."""
    if values is None:
        return None
    each = jnp.broadcast_to(values.astype(jnp.float32)[None, :, None], (tokens, *values.shape, 1))
    return stack_rows(each[None], kv_heads, rows)[0, ..., 0]


def sequence_items(
    lengths: Array, first_position: Array, slots: int, keys: int, masking: Masking
) -> Items:
    """One item a sequence, with only the blocks that its window needs.

    Args:
        lengths: `int32[batch]`, tokens that each sequence has.
        first_position: `int32[batch]`, of the sequence's first query.
        slots: there are; a sequence with more tokens is in a ring.
        keys: of a block.
        masking: static.
    """
    number = jnp.arange(len(lengths), dtype=jnp.int32)
    used, one = jnp.minimum(lengths, slots), jnp.ones_like(number)
    stop = jnp.maximum(-(-used // keys), 1)
    begin = number * masking.tokens
    first, sinks = seen_blocks(first_position, stop, keys, masking)
    return Items(
        tile=number,
        sequence=number,
        first=first,
        sink_blocks=sinks,
        blocks=sinks + stop - first,
        begin=begin,
        end=begin + masking.tokens,
        shift=first_position - begin,
        length=used,
        opens=one,
        closes=one,
    )


def seen_blocks(
    first_position: Array, stop: Array, keys: int, masking: Masking
) -> tuple[Array, Array]:
    """The first block that the window of the first query needs, and how many blocks before it the
    sinks need.
    """
    if masking.window is None or masking.ring is not None:
        return jnp.zeros_like(stop), jnp.zeros_like(stop)
    first = jnp.clip((first_position - masking.window + 1) // keys, 0, stop - 1)
    return first, jnp.minimum(first, -(-masking.sinks // keys))


def dealt_items(items: Items, count: Array, tiles: int, splits: int) -> tuple[Items, Array]:
    """Each tile's blocks dealt to parts of it.

    Args:
        items: in the order of their tiles; if there are as many as tiles, each has one.
        count: how many of them are real.
        tiles: there are.
        splits: parts of a tile.

    Returns the items in the order of parts, and `int32[tiles * splits + 1]`, the first of each.
    """
    part, real = jnp.arange(tiles * splits + 1, dtype=jnp.int32), count * splits
    alone = len(items.tile) == tiles
    items = items if splits == 1 else _split(items, splits)
    if alone:
        return items, jnp.minimum(part, real)
    number = jnp.arange(len(items.tile), dtype=jnp.int32)
    owner = jnp.where(number < real, items.tile * splits + number % splits, tiles * splits)
    if splits > 1:
        order = jnp.argsort(owner, stable=True)
        items, owner = Items(*(x[order] for x in items)), owner[order]
    return items, jnp.searchsorted(owner, part).astype(jnp.int32)


def _split(items: Items, splits: int) -> Items:
    """Each item as so many neighbours, of equal shares of its blocks; the first has the sinks'."""
    number = jnp.arange(splits, dtype=jnp.int32)
    share = jnp.maximum(-(-items.blocks // splits), items.sink_blocks)[:, None]
    begin = number * share
    sinks = jnp.where(number == 0, items.sink_blocks[:, None], 0)
    first = items.first[:, None] + jnp.maximum(begin - items.sink_blocks[:, None], 0)
    blocks = jnp.clip(items.blocks[:, None] - begin, 0, share)
    whole = Items(*(jnp.broadcast_to(x[:, None], (len(x), splits)) for x in items))
    parts = whole._replace(first=first, sink_blocks=sinks, blocks=blocks)
    return Items(*(x.reshape(-1) for x in parts))


def one_token_items(rank: Array, lengths: Array, keys: int, masking: Masking) -> Items:
    """One item a sequence, those of `rank` first: for tiles of one token, the last of each."""
    lengths = lengths[rank]
    items = sequence_items(lengths, lengths - 1, 1 << 30, keys, masking)
    return items._replace(sequence=rank.astype(jnp.int32))


def tile_items(
    starts: Array,
    ends: Array,
    lengths: Array,
    mine: Array,
    tiles: int,
    keys: int,
    masking: Masking,
) -> tuple[Items, Array]:
    """An item for each tile of a flat list of tokens and each of the sequences within it.

    Args:
        starts, ends: `int32[sequences]`, tokens of each sequence.
        lengths: tokens that each has in the cache; the listed are the last.
        mine: `bool[sequences]`, which are wanted.
        tiles: in the list.
        keys: of a block.
        masking: static.

    Returns the items, and how many of them are real.
    """
    tokens = masking.tokens
    first_tile = starts // tokens
    number = jnp.where(mine, (ends - 1) // tokens - first_tile + 1, 0)
    stops = jnp.cumsum(number)
    item = jnp.arange(tiles + len(starts), dtype=jnp.int32)
    s = jnp.minimum(jnp.searchsorted(stops, item, side="right"), len(starts) - 1)
    tile = first_tile[s] + item - (stops[s] - number[s])
    shift = (lengths - ends)[s]
    last = jnp.minimum(ends[s], (tile + 1) * tokens) - 1 + shift
    needed = jnp.minimum(lengths[s], last + 1) if masking.causal else lengths[s]
    stop = jnp.maximum(-(-needed // keys), 1)
    oldest = jnp.maximum(starts[s], tile * tokens) + shift
    first, sinks = seen_blocks(oldest, stop, keys, masking)
    before = jnp.roll(tile, 1).at[0].set(-1)
    after = jnp.where(item + 1 < stops[-1], jnp.roll(tile, -1), -1)
    items = Items(
        tile=tile,
        sequence=s.astype(jnp.int32),
        first=first,
        sink_blocks=sinks,
        blocks=sinks + stop - first,
        begin=starts[s],
        end=ends[s],
        shift=shift,
        length=lengths[s],
        opens=(tile != before).astype(jnp.int32),
        closes=(tile != after).astype(jnp.int32),
    )
    return items, stops[-1]


def masking_of(
    tokens: int,
    group: int,
    rows: int,
    *,
    head_dim: int,
    scale: float | None = None,
    softmax: Any,
    alibi_slopes: Array | None,
    **options: Any,
) -> Masking:
    """`Masking` from a call's arguments."""
    unified = None if isinstance(softmax, str) else (softmax.low, softmax.high)
    return Masking(
        tokens,
        group,
        rows,
        head_dim**-0.5 if scale is None else scale,
        unified=unified,
        alibi=alibi_slopes is not None,
        **options,
    )
