"""How codes of 1 to 8 bits lie in 32-bit words: one form on disk, on a TPU, on a GPU and on a CPU.

    codes [rows, N], values 0 .. 2**bits - 1    <->    words uint32[packed_rows(rows, bits), N]

A word holds codes of one column; columns lie side by side, on a TPU's lanes and for neighbouring
threads of a GPU, and nothing is ever transposed. A code of 3, 5, 6 or 7 bits is cut into planes of
4, 2 and 1 bits, so `bits` bits are `bits` bits: no word is straddled, none is padded.

A plane of w bits has tiles of 256/w rows in 8 rows of words, `row 16 j + 2 t + h` at bit
`16 h + w j` of word row t. For 4 bits, a tile of 64 rows:

    bit          31   28 27   24 23   20 19   16 15   12 11    8 7     4 3     0
                +-------+-------+-------+-------+-------+-------+-------+-------+
    word row 0  |   49  |   33  |   17  |    1  |   48  |   32  |   16  |    0  |
    word row 1  |   51  |   35  |   19  |    3  |   50  |   34  |   18  |    2  |
        ...     |                            ...                                |
    word row 7  |   63  |   47  |   31  |   15  |   62  |   46  |   30  |   14  |
                +-------+-------+-------+-------+-------+-------+-------+-------+

Each half of a word is a 16-bit place. One shift and one mask of the 8 word rows leave 16 rows in
order, two to a word, as bfloat16 lies in a TPU's registers (a tile of 16 x 128), and the pair
(2 t, 2 t + 1) is also what a thread of an NVIDIA tensor core holds of an operand. The bits of a
code are moved to the top of a bfloat16's mantissa and become `1 + code / 2**bits` by one `or`;
no conversion is ever made (`tpu.py`).

The tile of a code is the largest of its planes' tiles, and its planes follow each other, widest
first. For 3 bits (2 + 1), 256 rows in 24 rows of words:

    word rows  0 ..  7   bits 0 and 1 of rows   0 .. 127
    word rows  8 .. 15   bits 0 and 1 of rows 128 .. 255
    word rows 16 .. 23   bit 2 of rows 0 .. 255

Rows are filled up with zeros to whole tiles (`tile_rows`). An axis of rows may be split between
devices at whole tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
"""Bits of a code -> bits of its planes, lowest bits first."""

WORD_ROWS = 8
"""Word rows of a tile of one plane: the sublanes of a TPU register."""

SLAB_ROWS = 16
"""Rows of codes that one shift and one mask of `WORD_ROWS` rows of words leave."""

SLABS: dict[int, tuple[int, int, int]] = {
    32: (1, 1, 2),
    64: (1, 1, 4),
    128: (1, 2, 4),
    256: (2, 2, 4),
}
"""Rows of a tile -> its slabs on three axes: a plane of 2 bits has a tile of its own at each place
of the first, a plane of 4 bits at each of the first two.
"""


def tile_rows(bits: int) -> int:
    """Rows of codes in a tile; packed rows are a multiple of `tile_rows(bits) * bits / 32`."""
    if bits not in PLANES:
        raise ValueError(f"codes have 1 to 8 bits; got bits={bits!r}")
    return 256 // min(PLANES[bits])


def packed_rows(rows: int, bits: int) -> int:
    """Rows of words that `rows` rows of codes take."""
    tile = tile_rows(bits)
    return -(-rows // tile) * (tile * bits // 32)


def pack(codes: Array, bits: int) -> Array:
    """`[..., rows, N]` integers 0 .. 2**bits - 1 -> `uint32[..., packed_rows(rows, bits), N]`.

    Higher bits of a code are dropped; signed codes `c` are packed as `c + 2 ** (bits - 1)`.
    """
    tile, (*lead, rows, columns) = tile_rows(bits), codes.shape
    count = -(-rows // tile)
    fill = [(0, 0)] * len(lead) + [(0, count * tile - rows), (0, 0)]
    codes = jnp.pad(jnp.asarray(codes).astype(jnp.uint32), fill)
    codes = codes.reshape(*lead, count, *SLABS[tile], WORD_ROWS, 2, columns)
    planes, below = [], 0
    for width in PLANES[bits]:
        placed = ((codes >> below) & (2**width - 1)) << _places(tile, width)
        kept = _sub_tiles(tile, width)
        summed = [axis - 6 for axis in range(3) if kept[axis] == 1] + [-2]
        words = jnp.sum(placed, axis=summed, dtype=jnp.uint32)  # disjoint bits: a sum is an or
        planes.append(words.reshape(*lead, count, tile * width // 32, columns))
        below += width
    return jnp.concatenate(planes, axis=-2).reshape(*lead, packed_rows(rows, bits), columns)


def unpack(words: Array, bits: int, rows: int | None = None, dtype: Any = jnp.uint8) -> Array:
    """The codes `dtype[..., rows, N]` of `pack`; None for `rows` keeps what fills the last tile."""
    tile, (*lead, height, columns) = tile_rows(bits), words.shape
    per_tile = tile * bits // 32
    if height % per_tile:
        raise ValueError(
            f"{height} rows of words are not a whole number of tiles; {bits}-bit codes have "
            f"{per_tile} rows a tile"
        )
    count = height // per_tile
    tiles = words.reshape(*lead, count, per_tile, columns)
    codes, first, below = None, 0, 0
    for width in PLANES[bits]:
        last = first + tile * width // 32
        plane = jax.lax.slice_in_dim(tiles, first, last, axis=-2)
        plane = plane.reshape(*lead, count, *_sub_tiles(tile, width), WORD_ROWS, 1, columns)
        field = ((plane >> _places(tile, width)) & (2**width - 1)) << below
        codes = field if codes is None else codes | field
        first, below = last, below + width
    assert codes is not None
    codes = codes.reshape(*lead, count * tile, columns).astype(dtype)
    return codes if rows is None else jax.lax.slice_in_dim(codes, 0, rows, axis=-2)


def _sub_tiles(tile: int, width: int) -> tuple[int, int, int]:
    """Tiles of a plane in a tile of the code, on the axes of `SLABS`: `tile * width / 256`."""
    outer, middle, _ = SLABS[tile]
    return (outer if width in (2, 4) else 1, middle if width == 4 else 1, 1)


def _places(tile: int, width: int) -> np.ndarray:
    """The lowest bit of each code in its word: `uint32[*SLABS[tile], 1, 2, 1]`."""
    slab = np.arange(tile // SLAB_ROWS).reshape(*SLABS[tile], 1, 1, 1)
    place = width * (slab % (16 // width)) + 16 * np.arange(2)[:, None]
    return place.astype(np.uint32)
