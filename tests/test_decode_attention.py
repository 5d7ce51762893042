"""Decode attention against float64 NumPy, the TPU kernel against it in interpret mode, and the
unified softmax with its fallback.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_decode import attend

from kernels_pallas.decode_attention import (
    SHAPES,
    Unified,
    cost,
    decode_attention,
    fallen_rows,
    reference,
    tpu,
)

BATCH, QUERIES, KV_HEADS, GROUP, SLOTS, DIM, LAYERS = 3, 2, 2, 3, 48, 8, 2
HEADS = KV_HEADS * GROUP
SLOPES = np.linspace(0.1, 0.6, HEADS).astype(np.float32)
MASKS = {
    "plain": {},
    "window": {"window": 5},
    "sinks": {"window": 5, "sinks": 3},
    "ring": {"rolling": True},
    "ring, window": {"rolling": True, "window": 30},
    "scores": {"soft_cap": 3.0, "alibi_slopes": SLOPES, "scale": 0.5},
}


@st.composite
def calls(draw):
    """Lengths and a seed: shapes stay, so that nothing is compiled again."""
    lengths = draw(st.lists(st.integers(0, SLOTS), min_size=BATCH, max_size=BATCH))
    return draw(st.integers(0, 2**32 - 1)), lengths


def arrays(seed, lengths, dtype=np.float32, poison=True):
    """q, k, v and lengths; what a sequence does not use is NaN or infinite."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(BATCH, QUERIES, HEADS, DIM))
    k, v = rng.normal(size=(2, LAYERS, BATCH, KV_HEADS, SLOTS, DIM))
    unused = np.arange(SLOTS) >= np.minimum(lengths, SLOTS)[:, None]
    if poison:
        k = np.where(unused[None, :, None, :, None], np.nan, k)
        v = np.where(unused[None, :, None, :, None], np.inf, v)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(lengths, jnp.int32)


def by_numpy(q, k, v, lengths, layer=1, rolling=False, **options):
    out, lse = [], []
    for b, length in enumerate(np.asarray(lengths)):
        used = min(length, SLOTS)
        positions = np.arange(SLOTS)
        if rolling:
            positions = np.asarray([max(range(s, max(length, s + 1), SLOTS)) for s in range(SLOTS)])
        found = attend(
            np.asarray(q[b], np.float64),
            np.swapaxes(np.asarray(k[layer, b], np.float64), 0, 1)[:used],
            np.swapaxes(np.asarray(v[layer, b], np.float64), 0, 1)[:used],
            length - QUERIES + np.arange(QUERIES),
            positions[:used],
            **options,
        )
        out.append(found[0])
        lse.append(found[1])
    return np.stack(out), np.stack(lse)


@functools.cache
def compiled(which, mask):
    """A jitted call of the plain function or of the kernel at layer 1; "online" if no softmax."""
    options = {**MASKS[mask], "layer": 1, "return_lse": True}
    function = decode_attention
    if which == "tpu":
        function, options = tpu.decode_attention, {**options, "block": 16, "interpret": True}
    online = jax.jit(functools.partial(function, **options))
    constant = jax.jit(lambda softmax, *given: function(*given, softmax=softmax, **options))
    return lambda *given, softmax=None: constant(softmax, *given) if softmax else online(*given)


def close(found, expected, out=2e-5, lse=1e-5):
    np.testing.assert_allclose(np.asarray(found[0], np.float64), expected[0], atol=out, rtol=out)
    np.testing.assert_allclose(np.asarray(found[1], np.float64), expected[1], atol=lse, rtol=lse)


@pytest.mark.parametrize("mask", MASKS)
@settings(max_examples=5, deadline=None)
@given(call=calls())
def test_plain_equals_float64_numpy_and_never_reads_beyond_a_length(mask, call):
    given_arrays = arrays(*call)
    if "rolling" in MASKS[mask]:
        given_arrays = *given_arrays[:3], given_arrays[3] * 2  # beyond the ring
        given_arrays = *arrays(call[0], np.asarray(given_arrays[3]))[:3], given_arrays[3]
    close(compiled("plain", mask)(*given_arrays), by_numpy(*given_arrays, **MASKS[mask]))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["sinks", "ring, window", "scores"])
@settings(max_examples=3, deadline=None)
@given(call=calls())
def test_the_tpu_kernel_equals_float64_numpy_and_never_reads_beyond_a_length(mask, call):
    seed, lengths = call
    lengths = np.asarray(lengths) * (2 if "rolling" in MASKS[mask] else 1)
    given_arrays = arrays(seed, lengths)
    close(compiled("tpu", mask)(*given_arrays), by_numpy(*given_arrays, **MASKS[mask]))


@pytest.mark.slow
def test_the_tpu_kernel_in_bfloat16_is_as_near_as_its_values():
    given_arrays = arrays(0, [0, 17, SLOTS], jnp.bfloat16)
    expected = by_numpy(*given_arrays, **MASKS["sinks"])
    close(compiled("tpu", "sinks")(*given_arrays), expected, out=2e-2, lse=1e-2)


def planted(phi):
    """Calls whose rows the constant serves but for some: row 1 of sequence 1 is far above it, row 0
    of sequence 2 far below.
    """
    q, k, v, lengths = arrays(3, [0, 33, SLOTS], poison=False)
    first = k[:, :, :, :1]  # one key for all, so that a query sets its scores
    k = jnp.broadcast_to(first / jnp.linalg.norm(first, axis=-1, keepdims=True), k.shape)
    along = DIM**0.5 * jnp.repeat(k[1, :, :, 0], GROUP, axis=1)
    q = q.at[1, 1].set(along[1] * (phi + 200)).at[2, 0].set(along[2] * (phi - 200))
    return (q, k, v, lengths), {(1, 1), (2, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["plain", "tpu"])
def test_rows_out_of_range_of_the_constant_equal_the_online_softmax_to_the_bit(which):
    phi = 1.5
    unified = Unified(jnp.full(HEADS, phi, jnp.float32))
    given_arrays, out_of_range = planted(phi)
    constant = compiled(which, "plain")(*given_arrays, softmax=unified)
    online = compiled(which, "plain")(*given_arrays)
    close(constant, tuple(np.asarray(x, np.float64) for x in online))
    for b in range(BATCH):
        for t in range(QUERIES):
            same = all(
                np.array_equal(x[b, t], y[b, t]) for x, y in zip(constant, online, strict=True)
            )
            assert same or (b, t) not in out_of_range, (b, t)
    assert not np.array_equal(constant[0][2, 1], online[0][2, 1])  # in range: another rounding
    fallen = np.argwhere(np.asarray(fallen_rows(constant[1], unified)))
    assert {(b, t) for b, t, _ in fallen} == out_of_range
    assert len(fallen) == HEADS * len(out_of_range)


@pytest.mark.slow
def test_a_row_with_nan_or_infinity_leaves_the_others_as_they_are():
    unified = Unified(jnp.zeros(HEADS, jnp.float32))
    q, k, v, lengths = arrays(5, [20, 33, SLOTS], poison=False)
    function = functools.partial(compiled("tpu", "plain"), softmax=unified)
    clean = function(q, k, v, lengths)
    dirty = function(q.at[1, 0, 2].set(jnp.nan).at[1, 1, 0].set(jnp.inf), k, v, lengths)
    assert np.isnan(dirty[0][1, 0, 2]).all()
    assert np.isnan(dirty[0][1, 1, 0]).all()
    for x, y in zip(clean, dirty, strict=True):
        rest = np.ones((BATCH, QUERIES, HEADS), bool)
        rest[1, 0, 2] = rest[1, 1, 0] = False
        np.testing.assert_array_equal(np.asarray(x)[rest], np.asarray(y)[rest])


def test_a_shift_of_the_constant_changes_no_result_beyond_rounding():
    given_arrays = arrays(7, [0, 9, SLOTS])
    expected = by_numpy(*given_arrays)
    for phi in (-100.0, -20.0, 0.0, 20.0, 100.0):
        unified = Unified(jnp.full(HEADS, phi, jnp.float32))
        close(compiled("plain", "plain")(*given_arrays, softmax=unified), expected)


def test_on_a_cpu_the_public_function_is_the_plain_function():
    given_arrays = arrays(0, [1, 2, 3])
    public = jax.jit(functools.partial(decode_attention, layer=1)).lower(*given_arrays)
    plain = jax.jit(functools.partial(reference.decode_attention, layer=1)).lower(*given_arrays)
    name = "jit_decode_attention"
    assert public.as_text().replace(name, "") == plain.as_text().replace(name, "")


def test_bad_arguments_say_what_would_be_right():
    q, k, v, lengths = arrays(0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"with a leading layer axis.*layer given"):
        decode_attention(q, k[0], v[0], lengths, layer=0)
    with pytest.raises(ValueError, match="sinks=2 with rolling=True"):
        decode_attention(q, k, v, lengths, layer=0, rolling=True, sinks=2)
    with pytest.raises(ValueError, match=r"phi has shape \(2,\); expected one for each of 6"):
        decode_attention(q, k, v, lengths, layer=0, softmax=Unified(jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"Unified\(low=3.0, high=1.0\): low must be less"):
        decode_attention(q, k, v, lengths, layer=0, softmax=Unified(jnp.zeros(6), 3.0, 1.0))
    with pytest.raises(ValueError, match="implementation 'tup' is not known; nearest: tpu"):
        decode_attention(q, k, v, lengths, layer=0, implementation="tup")
    with pytest.raises(ValueError, match="'tpu': this program is compiled for cpu"):
        decode_attention(q, k, v, lengths, layer=0, implementation="tpu")


def test_a_block_divides_the_slots_or_holds_them_all():
    assert tpu.block_of(4096, 8, 256, jnp.bfloat16) == 512
    assert tpu.block_of(1000, 8, 256, jnp.bfloat16) == 1000
    assert tpu.block_of(1001, 8, 256, jnp.bfloat16) is None  # a part of a tile cannot be copied
    assert tpu.block_of(501, 8, 256, jnp.float32) == 501
    assert tpu.block_of(5003, 8, 256, jnp.bfloat16) is None  # a prime: the plain function
    assert tpu.block_of(4096, 32, 256, jnp.float32) == 64


@pytest.mark.parametrize("name", SHAPES)
def test_the_cost_is_that_of_reading_the_cache_once(name):
    shape = SHAPES[name]
    q = jax.ShapeDtypeStruct((shape.batch, shape.queries, shape.heads, shape.head_dim), "bfloat16")
    k = jax.ShapeDtypeStruct((shape.batch, shape.kv_heads, shape.slots, shape.head_dim), "bfloat16")
    tokens = shape.batch * shape.slots
    flops, read = cost.decode_attention(q, k, k, tokens=tokens)
    cache = 2 * tokens * shape.kv_heads * shape.head_dim * 2
    assert cache < read < 1.1 * cache
    assert flops / cache == pytest.approx(shape.queries * shape.heads / shape.kv_heads)
