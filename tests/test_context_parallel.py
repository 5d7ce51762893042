"""Long sequences split over devices: the same attention and gradients as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention
from sharding import MeshConfig, check_heads, context_attention, make_layout, make_mesh

LENGTH, BATCH, DIM = 32, 4, 4


def _inputs(heads, kv_heads, packed=True, seed=0):
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.normal, size=(BATCH, LENGTH, heads, DIM))
    q, cotangent = (draw().astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(BATCH, LENGTH, kv_heads, DIM)).astype(np.float32) for _ in range(2))
    segments = np.ones((BATCH, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    for row in range(BATCH if packed else 0):
        cuts = np.sort(rng.choice(np.arange(1, LENGTH), size=3, replace=False))
        segments[row] = np.searchsorted(cuts, np.arange(LENGTH), side="right") + 1
        segments[row, cuts[-1] :] = 0
        starts = np.concatenate([[0], cuts])[np.searchsorted(cuts, positions[row], side="right")]
        positions[row] -= starts
    where = {
        "query_positions": positions,
        "key_positions": positions,
        "query_segment_ids": segments if packed else None,
        "key_segment_ids": segments if packed else None,
    }
    return q, k, v, where, cotangent


def _numpy_attention(q, k, v, where, window=None, causal=True, slopes=None, soft_cap=None):
    """Float64 attention row by row, written without any of the tricks of the real one."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        distance = where["query_positions"][b, t] - where["key_positions"][b]
        seen = np.ones(k.shape[1], bool)
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= np.abs(distance) < window
        if where["query_segment_ids"] is not None:
            mine = where["query_segment_ids"][b, t]
            seen &= (where["key_segment_ids"][b] == mine) & (mine > 0)
        if not seen.any():
            continue
        scores = k[b, seen, h // group] @ q[b, t, h] * q.shape[-1] ** -0.5
        if slopes is not None:
            scores -= slopes[h] * np.abs(distance[seen])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads", "packed", "options"),
    [
        ({"context": 8, "data": 1}, 4, 4, True, {}),
        ({"context": 4, "data": 2}, 4, 2, False, {"window": 5}),
        ({"context": 2, "fsdp": 2, "tensor": 2}, 4, 2, True, {"soft_cap": 2.0}),
        ({"context": 2, "tensor": 4}, 8, 2, True, {"causal": False}),
        ({"context": 2, "tensor": 4}, 12, 6, True, {"window": 7}),
    ],
    ids=["context", "data-window-unpacked", "fsdp-tensor-cap", "shared-keys", "uneven-groups"],
)
def test_split_attention_equals_the_formula_and_its_gradients_those_of_one_device(
    kind, mesh, heads, kv_heads, packed, options
):
    q, k, v, where, cotangent = _inputs(heads, kv_heads, packed)
    layout = check_heads(make_layout(make_mesh(MeshConfig(**mesh))), heads, kv_heads)

    def split(q, k, v):
        return context_attention(attention, q, k, v, **where, layout=layout, kind=kind, **options)

    def whole(q, k, v):
        return attention(q, k, v, **where, **options)

    out, pull = jax.vjp(jax.jit(split), q, k, v)
    expected = _numpy_attention(q, k, v, where, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    for mine, reference in zip(
        jax.jit(pull)(cotangent), jax.vjp(whole, q, k, v)[1](cotangent), strict=True
    ):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=2e-5)


def test_alibi_slopes_follow_their_heads_and_get_gradients():
    q, k, v, where, cotangent = _inputs(4, 4)
    slopes = np.asarray([0.5, 0.25, 0.125, 0.0625], np.float32)
    layout = make_layout(make_mesh(MeshConfig(context=4, tensor=2)))

    def loss(attend, slopes):
        return jnp.sum(attend(q, k, v, **where, alibi_slopes=slopes) * cotangent)

    split = functools.partial(context_attention, attention, layout=layout)
    np.testing.assert_allclose(
        jax.jit(split)(q, k, v, **where, alibi_slopes=slopes),
        _numpy_attention(q, k, v, where, slopes=slopes),
        atol=1e-5,
    )
    mine, reference = (
        jax.jit(jax.grad(functools.partial(loss, f)))(slopes) for f in (split, attention)
    )
    np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-5)


def test_tokens_in_zigzag_order_attend_by_position_not_by_place():
    q, k, v, where, _ = _inputs(2, 2)
    order = np.arange(LENGTH).reshape(8, -1)[[0, 7, 1, 6, 2, 5, 3, 4]].ravel()
    layout = make_layout(make_mesh(MeshConfig(context=4)))
    moved = {name: value[:, order] for name, value in where.items()}
    split = jax.jit(functools.partial(context_attention, attention, layout=layout))
    out = split(q[:, order], k[:, order], v[:, order], **moved)
    np.testing.assert_allclose(out, _numpy_attention(q, k, v, where)[:, order], atol=1e-5)


def test_bfloat16_ring_is_as_close_to_float32_as_unsplit_attention_is():
    q, k, v, where, _ = _inputs(4, 2)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    exact = _numpy_attention(*[np.asarray(x, np.float32) for x in half], where)
    layout = make_layout(make_mesh(MeshConfig(context=8)))
    ring = jax.jit(functools.partial(context_attention, attention, layout=layout))(*half, **where)
    whole = attention(*half, **where)
    assert ring.dtype == jnp.bfloat16
    error = [float(np.abs(np.asarray(x, np.float32) - exact).max()) for x in (ring, whole)]
    assert error[0] <= 1.5 * error[1]


def test_the_ring_never_gathers_all_keys_and_the_gather_does():
    q, k, v, where, _ = _inputs(2, 2)
    layout = make_layout(make_mesh(MeshConfig(context=8)))

    def text(kind):
        def loss(q, k, v):
            return context_attention(attention, q, k, v, **where, layout=layout, kind=kind).sum()

        split = layout.sharding(("batch", "length", "heads", None))
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=split, out_shardings=split)
        return gradient.lower(q, k, v).compile().as_text()

    ring, gather = text("ring"), text("all_gather")
    assert "collective-permute" in ring
    assert "all-gather" not in ring
    assert "all-gather" in gather


def test_a_length_that_does_not_divide_is_an_error_that_says_so():
    q, k, v, where, _ = _inputs(2, 2)
    short = {name: value[:, :30] for name, value in where.items()}
    layout = make_layout(make_mesh(MeshConfig(context=8)))
    with pytest.raises(ValueError, match=r"length of 30 does not divide over 8 devices .*context"):
        context_attention(attention, q[:, :30], k[:, :30], v[:, :30], **short, layout=layout)
    with pytest.raises(ValueError, match="not one of"):
        context_attention(attention, q, k, v, **where, layout=layout, kind="rings")
