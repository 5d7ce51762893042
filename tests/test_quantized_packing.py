"""Packed codes: every width comes back, lies where the picture says, and takes no bit more."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.quantized_matmul import pack, packed_rows, tile_rows, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=2, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 31, 64, 130, 256, 300]),
    columns=st.sampled_from([1, 5]),
    layers=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_come_back_from_their_words(bits, rows, columns, layers, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (*layers, rows, columns))
    words = pack(jnp.asarray(codes), bits)
    assert words.dtype == jnp.uint32
    assert words.shape == (*layers, packed_rows(rows, bits), columns)
    np.testing.assert_array_equal(unpack(words, bits, rows), codes)
    assert not np.any(unpack(words, bits)[..., rows:, :])


@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_tiles_take_exactly_their_bits(bits):
    rows = 4 * tile_rows(bits)
    assert packed_rows(rows, bits) * 32 == rows * bits


def where_the_picture_says(row, bits):
    """`[(word row, bit of the word, bits)]` of a code, from the formula of the docstring alone."""
    planes = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,))
    tile = 256 // min(planes)
    number, row = divmod(row, tile)
    found, first = [], number * tile * bits // 32
    for width in planes:
        sub_tile, inside = divmod(row, 256 // width)
        j, rest = divmod(inside, 16)
        t, h = divmod(rest, 2)
        found.append((first + 8 * sub_tile + t, 16 * h + width * j, width))
        first += tile * width // 32
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_those_of_the_picture(bits):
    rows = 2 * tile_rows(bits)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (rows, 3)).astype(np.uint64)
    words = np.zeros((packed_rows(rows, bits), 3), np.uint64)
    for row in range(rows):
        below = 0
        for word_row, place, width in where_the_picture_says(row, bits):
            field = (codes[row] >> np.uint64(below)) & np.uint64(2**width - 1)
            words[word_row] |= field << np.uint64(place)
            below += width
    np.testing.assert_array_equal(pack(jnp.asarray(codes, jnp.uint32), bits), words)


def test_two_words_written_by_hand():
    codes = np.zeros((64, 1), np.int32)
    codes[0], codes[1], codes[16], codes[63] = 0xA, 0xB, 0xC, 0xD
    words = np.asarray(pack(jnp.asarray(codes), 4))[:, 0]
    assert [hex(word) for word in words] == ["0xb00ca", *["0x0"] * 6, "0xd0000000"]


def test_tiles_may_be_split_between_devices():
    codes = np.random.default_rng(0).integers(0, 8, (1024, 8))
    whole = pack(jnp.asarray(codes), 3)
    halves = [pack(jnp.asarray(half), 3) for half in np.split(codes, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_packing_is_traceable_and_says_what_does_not_fit():
    codes = jnp.arange(64, dtype=jnp.int8)[:, None] % 16
    np.testing.assert_array_equal(jax.jit(lambda c: unpack(pack(c, 4), 4))(codes), codes)
    with pytest.raises(ValueError, match="1 to 8 bits; got bits=9"):
        pack(codes, 9)
    with pytest.raises(ValueError, match=r"7 rows of words.*3-bit codes have 24 rows a tile"):
        unpack(jnp.zeros((7, 1), jnp.uint32), 3)


PICTURE = re.compile(r"    (\d) bits, a tile of (\d+) rows:\n(.*?)\n\n", flags=re.DOTALL)


def test_the_pictures_of_the_docs_are_what_pack_does():
    text = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text()
    pictures = PICTURE.findall(text)
    assert [bits for bits, _, _ in pictures] == ["8", "4", "2"]
    for bits, tile, picture in pictures:
        cells = re.findall(r"word row (\d) +\|(.*)\|", picture)
        assert (int(tile), len(cells)) == (tile_rows(int(bits)), 8)
        codes = np.arange(int(tile))[:, None] == np.arange(int(tile))
        words = np.asarray(pack(jnp.asarray(codes), int(bits)))  # column r has its 1 in row r
        for row, line in cells:
            for place, code in enumerate(reversed(line.split("|"))):
                assert words[int(row), int(code)] == 1 << (int(bits) * place)
