"""Quantized keys and values: grids and packing against NumPy, attention against what the pages read
back as, and the TPU kernel against that in interpret mode.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_decode import attend

from kernels_pallas.decode_attention import Unified
from kernels_pallas.kv_quant import (
    Int8Pages,
    KiviPages,
    cost,
    gpu,
    kivi_attention,
    pack,
    quantize_groups,
    quantize_int8,
    quantized_attention,
    tpu,
    unpack,
)

BATCH, WIDTH, SIZE, KV_HEADS, GROUP, DIM, QUERIES = 3, 4, 32, 2, 3, 32, 2
HEADS, PAGES = KV_HEADS * GROUP, BATCH * WIDTH
KINDS = ("int8", 2, 4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]), st.integers(1, 3))
def test_packed_codes_come_back_and_lie_where_the_picture_says(seed, bits, words):
    rng = np.random.default_rng(seed)
    tokens = words * 32 // bits
    codes = rng.integers(0, 2**bits, size=(2, tokens, 3))
    packed = np.asarray(pack(jnp.asarray(codes, jnp.int32), bits))
    assert packed.shape == (2, words, 3)
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits), codes)
    token = rng.integers(tokens)
    stretch, word = divmod(int(token), words)
    found = (packed[:, word].view(np.uint32) >> np.uint32(bits * stretch)) & np.uint32(2**bits - 1)
    np.testing.assert_array_equal(found, codes[:, token])


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4]),
    st.sampled_from([-1, -2]),
    st.sampled_from([1.0, 1e-3, 300.0]),
)
def test_codes_and_grids_are_those_of_the_published_formulas(seed, bits, axis, size):
    """KIVI's: z = min, s = (max - min) / (2^b - 1), q = round((x - z) / s)."""
    rng = np.random.default_rng(seed)
    x = (size * rng.normal(size=(2, 16, 16))).astype(np.float32)
    x[0, :8, :8] = 1.0  # groups of equal numbers
    codes, grid = quantize_groups(jnp.asarray(x), bits, 8, axis)
    groups = np.moveaxis(x.astype(np.float64), axis, -1).reshape(2, 16, 2, 8)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.where(high > low, (high - low) / (2**bits - 1), 1.0)
    exact = (groups - low[..., None]) / scale[..., None]
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    found = np.moveaxis(np.asarray(codes), axis, -1).reshape(2, 16, 2, 8)
    np.testing.assert_array_equal(found[~tie], np.round(exact)[~tie])
    parts = np.moveaxis(np.asarray(grid, np.float64), -3, 0)
    for part, expected in zip(parts, (scale, low), strict=True):
        np.testing.assert_allclose(np.moveaxis(part, axis, -1), expected, rtol=1e-6)
    back = found * scale[..., None] + low[..., None]
    assert (np.abs(back - groups) <= scale[..., None] / 2 + 1e-5 * size).all()


def test_int8_keeps_the_maximum_and_zeros_stay_zeros():
    x = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    codes, scales = quantize_int8(jnp.asarray(x))
    assert np.abs(np.asarray(codes)).max() == 127
    back = np.asarray(codes, np.float64) * np.asarray(scales)[:, None]
    uniform = np.sqrt(np.mean(np.asarray(scales) ** 2) / 12)  # of a rounding to whole numbers
    assert np.sqrt(np.mean((back - x) ** 2)) == pytest.approx(uniform, rel=0.05)
    codes, scales = quantize_int8(jnp.zeros((3, 8)))
    assert not codes.any()
    assert not scales.any()


def test_keys_with_outlier_channels_want_groups_of_tokens():
    """The reason of the layout: a channel's offset costs groups of channels their resolution."""
    x = np.random.default_rng(0).normal(size=(256, 128))
    x[:, :4] += 20.0
    error = {}
    for axis in (-1, -2):
        codes, grid = quantize_groups(jnp.asarray(x), 2, 32, axis)
        scale, zero = (np.repeat(np.asarray(part), 32, axis) for part in grid)
        kept = (np.asarray(codes) * scale + zero - x)[:, 4:]
        error[axis] = np.linalg.norm(kept) / np.linalg.norm(x[:, 4:])
    assert error[-2] < 0.4
    assert error[-1] > 1.2 * error[-2]


def filled(kind, seed=0, dtype=jnp.float32, poison=True):
    """q, pages with random tokens in every page, page_table and lengths; what is beyond a length
    has NaN for its scale.
    """
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(x, dtype) for x in rng.normal(size=(2, PAGES, KV_HEADS, SIZE, DIM)))
    q = jnp.asarray(rng.normal(size=(BATCH, QUERIES, HEADS, DIM)), dtype)
    table = rng.permutation(PAGES).reshape(BATCH, WIDTH)
    sizes = (2, PAGES, KV_HEADS, SIZE, DIM)
    if kind == "int8":
        lengths, slots = [0, 45, 128], jnp.arange(PAGES * SIZE, dtype=jnp.int32)
        flat = (jnp.swapaxes(x, 1, 2).reshape(-1, KV_HEADS, DIM) for x in (k, v))
        pages = Int8Pages.empty(*sizes).write(1, slots, *flat)
        grid = "value_scales"
    else:
        lengths = [0, 64, 128]
        pages = KiviPages.empty(*sizes, bits=kind, group=16, dtype=dtype)
        pages = pages.write(1, jnp.arange(PAGES), k, v)
        grid = "value_grid"
    if poison:
        bad = getattr(pages, grid)
        for b, length in enumerate(lengths):
            for page, number in enumerate(table[b]):
                bad = bad.at[1, number, ..., max(0, min(SIZE, length - page * SIZE)) :].set(jnp.nan)
        pages = jax.tree_util.tree_map(lambda x: x, pages)
        object.__setattr__(pages, grid, bad)
    return q, pages, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


def by_numpy(q, pages, table, lengths, positions=None, **options):
    out, lse = [], []
    for b, length in enumerate(np.asarray(lengths)):
        k, v = (
            np.swapaxes(np.asarray(x, np.float64), 1, 2).reshape(-1, KV_HEADS, DIM)[:length]
            for x in pages.read(1, table[b])
        )
        first = length - QUERIES if positions is None else int(positions[b])
        at = first + np.arange(QUERIES), np.arange(length)
        found = attend(q[b], k, v, *at, **options)
        out.append(found[0])
        lse.append(found[1])
    return np.stack(out), np.stack(lse)


def close(found, expected, out=2e-5, lse=1e-5):
    np.testing.assert_allclose(np.asarray(found[0], np.float64), expected[0], atol=out, rtol=out)
    np.testing.assert_allclose(np.asarray(found[1], np.float64), expected[1], atol=lse, rtol=lse)


@pytest.mark.parametrize(
    "which", ["plain", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tpu", "gpu"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_to_what_the_pages_read_back_as(kind, which):
    q, pages, table, lengths = filled(kind)
    options = {"layer": 1, "return_lse": True, "soft_cap": 5.0}
    function = functools.partial(quantized_attention, **options)
    if which == "tpu":
        options |= {"block_pages": 2, "interpret": True}
        function = functools.partial(tpu.quantized_attention, **options)
    if which == "gpu":
        options |= {"splits": 2, "interpret": True}
        function = functools.partial(gpu.quantized_attention, **options)
    for further in (None, lengths + 5)[which != "plain" :]:
        found = jax.jit(function)(q, pages, table, lengths, positions=further)
        close(found, by_numpy(q, pages, table, lengths, further, soft_cap=5.0))


@pytest.mark.slow
def test_rows_out_of_range_of_the_constant_fall_back_on_a_gpu():
    q, pages, table, lengths = filled(2)
    softmax = Unified(jnp.asarray([0.0, 100.0, 0.0, 0.0, -100.0, 0.0], jnp.float32))
    options = {"layer": 1, "return_lse": True, "splits": 1, "interpret": True}
    function = functools.partial(gpu.quantized_attention, q, pages, table, lengths, **options)
    found, online = function(softmax=softmax), function()
    close(found, by_numpy(q, pages, table, lengths))
    for x, y in zip(found, online, strict=True):
        np.testing.assert_array_equal(x[:, :, [1, 4]], y[:, :, [1, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", 2])
def test_the_tpu_kernel_in_bfloat16_is_as_near_as_its_values(kind):
    q, pages, table, lengths = filled(kind, dtype=jnp.bfloat16)
    function = functools.partial(tpu.quantized_attention, block_pages=2, interpret=True)
    found = jax.jit(functools.partial(function, layer=1, return_lse=True))(q, pages, table, lengths)
    close(found, by_numpy(q, pages, table, lengths), out=2e-2, lse=1e-2)


@pytest.mark.parametrize("newest", [2, 7, 31])
def test_the_tokens_that_are_not_quantized_yet_are_attended_to_exactly(newest):
    q, pages, table, lengths = filled(2, poison=False)
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, 2, BATCH, KV_HEADS, 32, DIM)).astype(np.float32)
    k[..., newest:, :] = np.nan
    residual = jnp.full(BATCH, newest, jnp.int32)
    function = functools.partial(kivi_attention, layer=1, return_lse=True)
    found = jax.jit(function)(q, pages, table, lengths, jnp.asarray(k), jnp.asarray(v), residual)
    for b, length in enumerate(np.asarray(lengths)):
        old = (
            np.swapaxes(np.asarray(x), 1, 2).reshape(-1, KV_HEADS, DIM)[:length]
            for x in pages.read(1, table[b])
        )
        both = (
            np.concatenate([x, np.swapaxes(new[1, b], 0, 1)[:newest]])
            for x, new in zip(old, (k, v), strict=True)
        )
        last = length + newest
        expected = attend(q[b], *both, last - QUERIES + np.arange(QUERIES), np.arange(last))
        close(tuple(x[b] for x in found), expected)


def test_a_token_or_page_that_is_to_be_dropped_changes_nothing():
    _, pages, _, _ = filled("int8", poison=False)
    k = jnp.ones((2, KV_HEADS, DIM))
    same = pages.write(1, jnp.full(2, -1, jnp.int32), k, k)
    for x, y in zip(jax.tree.leaves(pages), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(x, y)
    written = pages.write(1, jnp.asarray([-1, 37], jnp.int32), k, 2 * k)
    keys, values = written.read(1, jnp.asarray([1]))
    np.testing.assert_allclose(keys[0, :, 5], 1.0, rtol=1e-6)
    np.testing.assert_allclose(values[0, :, 5], 2.0, rtol=1e-6)


def test_bytes_of_a_token_are_what_is_promised():
    """At most 3.0 bits an element in groups of 32, and 1.06 bytes at a dim of 64."""
    kivi = jax.eval_shape(lambda: KiviPages.empty(1, 4, 8, 128, 128))
    assert cost.token_bytes(kivi) * 8 / (2 * 8 * 128) == 3.0
    int8 = jax.eval_shape(lambda: Int8Pages.empty(1, 4, 8, 128, 64))
    assert cost.token_bytes(int8) / (2 * 8 * 64) == pytest.approx(1.0625)


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="page_size=48 is not a multiple of group=32"):
        KiviPages.empty(1, 1, 1, 48, 64)
    with pytest.raises(ValueError, match="dim=80 is not a multiple of group=32"):
        KiviPages.empty(1, 1, 1, 64, 80)
    with pytest.raises(ValueError, match="bits=3; keys and values of 2 or 4 bits"):
        KiviPages.empty(1, 1, 1, 64, 64, bits=3)
    q, pages, table, lengths = filled(2)
    with pytest.raises(ValueError, match="with pages of 2 kv heads of 32"):
        quantized_attention(q[..., :16], pages, table, lengths)
