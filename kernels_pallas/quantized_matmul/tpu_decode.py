"""Words of codes to bfloat16 in a TPU's registers, for the kernels of `tpu.py`.

The bits of a code go to the top of a bfloat16's mantissa, so a word of two 16-bit places becomes
two numbers `1 + code / 2**bits` by a shift, a mask and an `or`: 1.5 vector operations for each 1024
codes, where shift, mask, conversion and packing are 3.5. `Decoded` says how to get the code back;
the kernels fold it into scale and zero. It holds up to 7 bits; 8 are converted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantized_matmul.packing import (
    PLANES,
    SLAB_ROWS,
    WORD_ROWS,
    tile_rows,
)

Array = jax.Array

MANTISSA = 7
"""Bits of a bfloat16's mantissa."""
ONES = 0x3F803F80
"""1.0 in both halves of a word."""
LANES = 128


@dataclass(frozen=True)
class Decoded:
    """`value = factor * (tile - bias)` for the tile that `decode` makes."""

    factor: float
    bias: float


def decoded(packed: bool, bits: int, table: bool, centered: bool = False) -> Decoded:
    """How the tiles of `decode` stand for values."""
    if packed and not table and bits <= MANTISSA:
        return Decoded(float(2**bits), -0.5 if centered else 1.0)
    return Decoded(1.0, 0.0)


def decode(stored: Array, packed: bool, bits: int, centered: bool = False) -> Array:
    """The tile `bfloat16[rows, columns]` of stored codes, whole tiles of them; `centered` around 0
    for one more operation.
    """
    if not packed:
        return stored.astype(jnp.bfloat16)
    if bits > MANTISSA:
        return _together([_converted(_slab(stored, bits, slab, 0)) for slab in _slabs(bits)])
    target = MANTISSA - bits
    slabs = [_slab(stored, bits, slab, target) | jnp.uint32(ONES) for slab in _slabs(bits)]
    tile = _together(slabs)
    return tile - jnp.bfloat16(1.5) if centered else tile


def look_up(stored: Array, bits: int, table: Array, route: str) -> Array:
    """The tile of entries of a table, which `table_words` made for the same `route`."""
    tiles = stored.shape[0] // (tile_rows(bits) * bits // 32)
    slabs = [_slab(stored, bits, slab, 0) for slab in _slabs(bits)]
    shape = (tiles, WORD_ROWS, stored.shape[-1])
    found = [ROUTES[route](slab.reshape(-1, stored.shape[-1]), table) for slab in slabs]
    return _together([pairs.reshape(shape) for pairs in found])


def table_words(table: Array, route: str, columns: int) -> Array:
    """A table of up to 16 entries, rounded to bfloat16, as its route wants it:
    `uint32[16, columns]`.
    """
    full = jnp.pad(table.astype(jnp.bfloat16), (0, 16 - table.shape[0]))
    entries = jax.lax.bitcast_convert_type(full, jnp.uint16).astype(jnp.uint32)
    if route == "lanes":
        row = jnp.tile(jnp.pad(entries, (0, LANES - 16)), columns // LANES)
        return jnp.repeat(jnp.stack([row, row << 16]), 8, axis=0)
    if route == "sublanes":
        low, high = entries[:8], entries[8:]
        rows = jnp.concatenate([low | (high << 16), high | (low << 16)])
    else:
        byte = jnp.stack([entries >> 8, entries & 255]).reshape(2, 4, 4)
        words = jnp.sum(byte << (8 * jnp.arange(4, dtype=jnp.uint32)), -1, dtype=jnp.uint32)
        rows = jnp.pad(words, ((0, 0), (0, 4))).reshape(16)
    return jnp.broadcast_to(rows[:, None], (16, columns))


def _by_lanes(codes: Array, table: Array) -> Array:
    """Each code picks one of a register's 128 lanes; entries lie in the low and the high half."""
    rows, columns = codes.shape
    low, high = table[:8, :LANES], table[8:, :LANES]
    made = []
    for row in range(0, rows, 8):
        found = []
        for column in range(0, columns, LANES):
            piece = codes[row : row + 8, column : column + LANES]
            found.append(_gather(low, piece & 15, 1) | _gather(high, piece >> 16, 1))
        made.append(jnp.concatenate(found, axis=1))
    return jnp.concatenate(made, axis=0)


def _by_sublanes(codes: Array, table: Array) -> Array:
    """Three bits pick one of a register's 8 sublanes, which holds two entries; the fourth shifts
    the one that is meant to its half.
    """
    made = []
    for row in range(0, codes.shape[0], 8):
        piece = codes[row : row + 8]
        low = _gather(table[:8], piece & 7, 0) >> ((piece & 8) << 1)
        high = _gather(table[8:], (piece >> 16) & 7, 0) << ((piece >> 15) & 16)
        made.append((low & 0xFFFF) | (high & jnp.uint32(0xFFFF0000)))
    return jnp.concatenate(made, axis=0)


def _by_bytes(codes: Array, table: Array) -> Array:
    """Each byte picks one of a register's 32 rows of bytes, the high and the low one of an entry.
    The codes of two rows of words are looked up at once.
    """
    high, low = pltpu.bitcast(table[:8], jnp.int8), pltpu.bitcast(table[8:], jnp.int8)
    made = []
    for row in range(0, codes.shape[0], 16):
        first, second = codes[row : row + 8], codes[row + 8 : row + 16]
        both = first if second.shape[0] == 0 else first | (second << 8)
        picked = pltpu.bitcast(both, jnp.int8)
        h = pltpu.bitcast(_gather(high, picked, 0), jnp.uint32)
        l = pltpu.bitcast(_gather(low, picked, 0), jnp.uint32)
        even = jnp.uint32(0x00FF00FF)
        made.append((l & even) | ((h & even) << 8))
        if second.shape[0]:
            made.append(((l >> 8) & even) | (h & jnp.uint32(0xFF00FF00)))
    return jnp.concatenate(made, axis=0)


def _gather(table: Array, index: Array, axis: int) -> Array:
    kind = jnp.int8 if index.dtype == jnp.int8 else jnp.int32
    return jnp.take_along_axis(table, index.astype(kind), axis, mode="promise_in_bounds")


ROUTES = {"lanes": _by_lanes, "sublanes": _by_sublanes, "bytes": _by_bytes}
"""Name -> how 16 entries are looked up: TPU v4, v5 and v6e on."""


def _slabs(bits: int) -> range:
    return range(tile_rows(bits) // SLAB_ROWS)


def _together(slabs: list[Array]) -> Array:
    """Slabs `[tiles, 8, columns]` of pairs, in order: `bfloat16[rows, columns]`."""
    stacked = jnp.stack(slabs, axis=1)
    return pltpu.bitcast(stacked.reshape(-1, stacked.shape[-1]), jnp.bfloat16)


def _converted(codes: Array) -> Array:
    """Pairs of whole numbers below 256 to pairs of bfloat16: the upper halves of float32."""
    low, high = (
        pltpu.bitcast(half.astype(jnp.int32).astype(jnp.float32), jnp.uint32)
        for half in (codes & 0xFFFF, codes >> 16)
    )
    return (low >> 16) | high


def _slab(stored: Array, bits: int, slab: int, target: int) -> Array:
    """The codes of one slab of every tile, from bit `target` of each half of a word on."""
    tile, columns = tile_rows(bits), stored.shape[-1]
    words = stored.reshape(-1, tile * bits // 32, columns)
    made, first, below = [], 0, 0
    for width in PLANES[bits]:
        sub_tile, place = divmod(slab, 16 // width)
        row = first + sub_tile * WORD_ROWS
        shifted = _shifted(words[:, row : row + WORD_ROWS], target + below - width * place)
        mask = ((2**width - 1) << (target + below)) * 0x00010001
        made.append(shifted & jnp.uint32(mask))
        first, below = first + tile * width // 32, below + width
    return functools.reduce(jnp.bitwise_or, made)


def _shifted(words: Array, left: int) -> Array:
    if left == 0:
        return words
    return words << jnp.uint32(left) if left > 0 else words >> jnp.uint32(-left)
