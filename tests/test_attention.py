"""Attention against float64 NumPy over drawn shapes and masks; rows that see nothing; merging of
parts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import SHAPES, attention, merge


def numpy_attention(q, k, v, visible, scale, soft_cap=None, bias=None):
    """Float64 attention, head by head: `(out [B, T, H, D], lse [B, T, H])`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale
    if bias is not None:
        scores = scores - bias
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(visible[:, None], scores, -np.inf)
    peak = np.maximum(scores.max(axis=-1, keepdims=True), -1e300)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", weights / np.where(total > 0, total, 1), v)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + peak, -np.inf)[..., 0]
    return out, np.swapaxes(lse, 1, 2)


def numpy_mask(q_pos, k_pos, q_seg, k_seg, causal, window, sinks=0):
    distance = q_pos[:, :, None].astype(int) - k_pos[:, None, :]
    visible = np.ones(distance.shape, bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= (np.abs(distance) < window) | (k_pos < sinks)[:, None, :]
    if q_seg is not None:
        visible &= (q_seg[:, :, None] == k_seg[:, None, :]) & (q_seg[:, :, None] > 0)
    return visible


@st.composite
def calls(draw):
    """Arguments of one attention call, and the matching call of the NumPy reference."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, queries, keys = 2, draw(st.sampled_from([1, 6])), draw(st.sampled_from([1, 9]))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    dim, value_dim = 5, draw(st.sampled_from([5, 8]))
    heads = kv_heads * group
    q = rng.normal(size=(batch, queries, heads, dim)).astype(np.float32)
    k = rng.normal(size=(batch, keys, kv_heads, dim)).astype(np.float32)
    v = rng.normal(size=(batch, keys, kv_heads, value_dim)).astype(np.float32)
    positions = rng.integers(0, 12, size=(batch, queries)), rng.integers(0, 12, size=(batch, keys))
    segments = None, None
    if draw(st.booleans()):
        segments = rng.integers(0, 3, (batch, queries)), rng.integers(0, 3, (batch, keys))
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 3])),
        "sinks": draw(st.sampled_from([0, 2])),
        "soft_cap": draw(st.sampled_from([None, 2.0])),
        "scale": draw(st.sampled_from([0.3, 1.0])),
    }
    slopes = rng.uniform(0.1, 1.0, heads).astype(np.float32) if draw(st.booleans()) else None
    return q, k, v, positions, segments, slopes, options


@functools.partial(jax.jit, static_argnames=("causal", "window", "sinks", "soft_cap", "scale"))
def compiled(q, k, v, positions, segments, slopes, **options):
    return attention(
        q,
        k,
        v,
        query_positions=positions[0],
        key_positions=positions[1],
        query_segment_ids=segments[0],
        key_segment_ids=segments[1],
        alibi_slopes=slopes,
        return_lse=True,
        **options,
    )


def run(call):
    *arrays, options = call
    return compiled(*arrays, **options)


def run_numpy(call):
    q, k, v, positions, segments, slopes, options = call
    visible = numpy_mask(
        *positions, *segments, options["causal"], options["window"], options["sinks"]
    )
    bias = None
    if slopes is not None:
        distance = np.abs(positions[0][:, :, None] - positions[1][:, None, :])
        bias = slopes[None, :, None, None] * distance[:, None]
    return numpy_attention(q, k, v, visible, options["scale"], options["soft_cap"], bias)


@settings(max_examples=20, deadline=None)
@given(calls())
def test_equals_float64_numpy(call):
    out, lse = run(call)
    expected_out, expected_lse = run_numpy(call)
    np.testing.assert_allclose(out, expected_out, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(calls())
def test_gradients_equal_float64_differences_and_are_zero_for_queries_that_see_nothing(call):
    q, k, v, positions, segments, slopes, options = call
    rng = np.random.default_rng(0)
    weight, lse_weight = rng.normal(size=(*q.shape[:3], v.shape[-1])), rng.normal(size=q.shape[:3])

    def total(module, run, q, k, v):
        out, lse = run((q, k, v, positions, segments, slopes, options))
        return (weight * out).sum() + (lse_weight * module.where(lse > -1e30, lse, 0.0)).sum()

    directions = [rng.normal(size=x.shape) for x in (q, k, v)]
    moved = [
        total(np, run_numpy, *(x + step * d for x, d in zip((q, k, v), directions, strict=True)))
        for step in (1e-6, -1e-6)
    ]
    gradients = jax.jit(jax.grad(functools.partial(total, jnp, run), argnums=(0, 1, 2)))(q, k, v)
    slope = sum(
        (np.asarray(g, np.float64) * d).sum() for g, d in zip(gradients, directions, strict=True)
    )
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=2e-3, atol=2e-4)
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    blind = ~numpy_mask(
        *positions, *segments, options["causal"], options["window"], options["sinks"]
    ).any(axis=-1)
    assert not np.asarray(gradients[0])[blind].any()


@settings(max_examples=8, deadline=None)
@given(calls(), st.sampled_from([0, 1, 4, 9]))
def test_parts_over_disjoint_keys_merge_to_the_whole(call, cut):
    q, k, v, positions, segments, slopes, options = call
    cut = min(cut, k.shape[1])

    def part(keys):
        if keys.start == keys.stop:
            return jnp.zeros((*q.shape[:3], v.shape[-1])), jnp.full(q.shape[:3], -jnp.inf)
        here = (None, None) if segments[0] is None else (segments[0], segments[1][:, keys])
        sliced = (positions[0], positions[1][:, keys])
        return run((q, k[:, keys], v[:, keys], sliced, here, slopes, options))

    parts = part(slice(0, cut)), part(slice(cut, k.shape[1]))
    out, lse = jax.jit(merge)(*zip(*parts, strict=True))
    expected_out, expected_lse = run(call)
    np.testing.assert_allclose(out, expected_out, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_padding_may_hold_anything(poison):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, heads, 4)), jnp.float32) for heads in (2, 1, 1))
    segments = jnp.asarray([[1, 1, 2, 2, 0, 0]])
    positions = jnp.asarray([[0, 1, 0, 1, 0, 1]])

    def run(*arrays):
        where = {"query_positions": positions, "key_positions": positions}
        where |= {"query_segment_ids": segments, "key_segment_ids": segments}
        out, lse = attention(*arrays, return_lse=True, **where)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), out

    function = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    clean, found = function(q, k, v), function(*(x.at[:, 4:].set(poison) for x in (q, k, v)))
    jax.tree.map(np.testing.assert_array_equal, clean, found)


def test_bfloat16_stays_close_to_float64():
    shape = SHAPES["quickstart"]
    rng = np.random.default_rng(0)
    draw = lambda *sizes: jnp.asarray(rng.uniform(-1, 1, sizes), jnp.bfloat16)  # noqa: E731
    q = draw(1, 64, shape.heads, shape.head_dim)
    k, v = (draw(1, 64, shape.kv_heads, shape.head_dim) for _ in range(2))
    positions = np.arange(64)[None]
    out = attention(q, k, v, query_positions=positions, key_positions=positions)
    assert out.dtype == jnp.bfloat16
    visible = numpy_mask(positions, positions, None, None, True, None)
    expected, _ = numpy_attention(q, k, v, visible, shape.head_dim**-0.5)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2)


def test_wrong_shapes_and_names_say_what_would_be_right():
    q, k = np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 2, 2, 4), np.float32)
    where = {"query_positions": np.zeros((1, 2), int), "key_positions": np.zeros((1, 2), int)}
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(q, k, k, **where)
    with pytest.raises(ValueError, match="'plian' is not known; nearest: plain"):
        attention(q, k, k, **where, implementation="plian")
    with pytest.raises(ValueError, match="come together"):
        attention(k, k, k, **where, query_segment_ids=np.ones((1, 2), int))
