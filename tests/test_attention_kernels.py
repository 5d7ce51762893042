"""The engines of flash attention, with all their gradients, against the plain function: the TPU
kernels as plain JAX, and the chunked one.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import attention, flash, reference, sees_anything
from kernels_pallas.attention.chunked import Chunked
from kernels_pallas.attention.scores import Rules
from kernels_pallas.attention.tpu import Tpu, Tuning, tuning_for
from kernels_pallas.attention.tpu_forward import Blocks
from kernels_pallas.attention.visits import FULL, HIDDEN, block_kinds, decode, visits


def tpu(heads=1, resident=1024):
    """Small blocks: several along both axes, two products a block, unequal in the two kernels."""
    forward, backward = Blocks(heads, 128, 256, 128), Blocks(heads, 128, 128, 128)
    return Tpu(Tuning(forward, backward, resident), interpret=True)


CASES = {
    # name: engine, (queries, keys, kv_heads, group, dim, value_dim), segments, options
    "tpu": (tpu(heads=2), (130, 300, 1, 2, 8, 8), True, {}),
    "tpu-all": (
        tpu(resident=256),
        (140, 300, 2, 2, 8, 16),
        True,
        {"window": 60, "sinks": 3, "soft_cap": 2.0, "alibi": True, "scale": 0.4},
    ),
    "tpu-both-ways": (tpu(heads=3), (1, 200, 1, 3, 8, 8), False, {"causal": False, "window": 40}),
    "chunked": (Chunked(2, 32, 64), (70, 100, 2, 2, 8, 16), True, {"window": 30, "sinks": 3}),
    "chunked-all": (
        Chunked(3, 32, 64),
        (1, 65, 1, 3, 8, 8),
        False,
        {"causal": False, "soft_cap": 2.0, "alibi": True},
    ),
}


def draw(case, seed, order):
    """Arguments and cotangents; poisoned where a token is padding, and clean."""
    _, (queries, keys, kv_heads, group, dim, value_dim), segmented, options = CASES[case]
    rng = np.random.default_rng(seed)
    batch, heads = 2, kv_heads * group
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k = normal(batch, queries, heads, dim), normal(batch, keys, kv_heads, dim)
    v = normal(batch, keys, kv_heads, value_dim)
    slopes = rng.uniform(0.01, 0.5, heads).astype(np.float32) if "alibi" in options else None
    cotangents = normal(batch, queries, heads, value_dim), normal(batch, queries, heads)
    tokens = np.sort(rng.integers(0, 4, (batch, keys)), axis=1) * rng.integers(0, 2, (batch, 1))
    positions = np.tile(np.arange(keys), (batch, 1))
    chosen = np.arange(keys)[keys - queries :]
    if order == "shuffled":
        chosen = rng.choice(keys, queries, replace=False)
    where = {
        "query_positions": positions[:, chosen].astype(np.int32),
        "key_positions": positions.astype(np.int32),
        "query_segment_ids": tokens[:, chosen].astype(np.int32) if segmented else None,
        "key_segment_ids": tokens.astype(np.int32) if segmented else None,
    }
    clean = (q, k, v, slopes, cotangents)
    if not segmented:
        return clean, clean, where
    poison = rng.choice([np.nan, np.inf, -np.inf])
    pads = where["query_segment_ids"] == 0, where["key_segment_ids"] == 0
    bad_q, bad_k, bad_v = q.copy(), k.copy(), v.copy()
    bad_out, bad_lse = (x.copy() for x in cotangents)
    for array, pad in ((bad_q, pads[0]), (bad_k, pads[1]), (bad_v, pads[1]), (bad_out, pads[0])):
        array[pad] = poison
    return clean, (bad_q, bad_k, bad_v, slopes, (bad_out, bad_lse)), where


@functools.partial(jax.jit, static_argnames=("case", "plain"))
def value_and_gradients(case, plain, arrays, where):
    engine, _, _, options = CASES[case]
    options = {name: value for name, value in options.items() if name != "alibi"}
    run = reference.attention if plain else functools.partial(flash.attention, engine)
    *primals, cotangents = arrays

    def function(q, k, v, slopes):
        return run(q, k, v, alibi_slopes=slopes, return_lse=True, **where, **options)

    results, pull = jax.vjp(function, *primals)
    return results, pull(cotangents)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), order=st.sampled_from(["in order", "shuffled"]))
def test_values_and_gradients_are_those_of_the_plain_function_and_padding_never_leaks(
    case, seed, order
):
    clean, poisoned, where = draw(case, seed, order)
    expected = value_and_gradients(case, True, clean, where)
    found = value_and_gradients(case, False, poisoned, where)
    for mine, reference_array in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(mine, reference_array, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_as_close_to_float32_as_the_plain_function_is():
    clean, _, where = draw("tpu", 0, "in order")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), clean[:3])
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    cotangents = clean[4]
    low = cotangents[0].astype(jnp.bfloat16), cotangents[1]
    truth = value_and_gradients("tpu", True, (*exact, None, cotangents), where)
    errors = []
    for plain in (True, False):
        found = value_and_gradients("tpu", plain, (*half, None, low), where)
        difference = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(jnp.nan_to_num(a.astype(jnp.float32) - b)))),
            found,
            truth,
        )
        errors.append(jax.tree.leaves(difference))
    for of_plain, of_kernel in zip(*errors, strict=True):
        assert of_kernel <= 1.5 * of_plain + 1e-6


def test_mapping_over_another_axis_is_a_longer_batch():
    clean, _, where = draw("tpu", 1, "in order")
    q, k, v = (np.stack([x, x[::-1]]) for x in clean[:3])
    engine = CASES["tpu"][0]

    def loss(q, k, v):
        return jnp.sum(flash.attention(engine, q, k, v, **where) ** 2)

    both = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, 0, None)))(q, k, v[0])
    plain = jax.jit(jax.grad(lambda q, k, v: jnp.sum(reference.attention(q, k, v, **where) ** 2)))
    for i in range(2):
        np.testing.assert_allclose(both[i], plain(q[i], k[i], v[0]), atol=5e-5)


RULES = [
    Rules(causal, window, sinks, None, 1.0, False, True)
    for causal in (True, False)
    for window, sinks in ((None, 0), (9, 0), (20, 3))
]


@functools.partial(jax.jit, static_argnums=0)
def blocks_and_mask(rules, queries, keys):
    kinds = block_kinds(rules, queries, keys, 8, 16)
    where = (queries[:, 0], keys[:, 0], queries[:, 1], keys[:, 1])
    where += (rules.causal, rules.window, rules.sinks)
    return kinds, visits(kinds), reference.mask(*where), sees_anything(*where)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rules=st.sampled_from(RULES), sort=st.booleans())
def test_blocks_are_hidden_or_full_only_if_the_mask_says_so_and_each_row_is_visited(
    seed, rules, sort
):
    rng = np.random.default_rng(seed)

    def tokens(length):
        segments = rng.integers(-1, 3, (2, length))
        segments = np.sort(segments, axis=1) if sort else segments
        return np.stack([rng.integers(0, 64, (2, length)), segments], 1).astype(np.int32)

    kinds, (codes, steps), mask, anything = jax.tree.map(
        np.asarray, blocks_and_mask(rules, tokens(32), tokens(48))
    )
    mask = mask.reshape(2, 4, 8, 3, 16).swapaxes(2, 3)
    assert not mask[kinds == HIDDEN].any()
    assert mask[kinds == FULL].all()
    assert anything >= mask.any()
    for row_kinds, row_codes in zip(kinds, codes, strict=True):
        major, minor, kind, first, last = decode(row_codes[: int(steps)])
        assert (np.diff(major) >= 0).all()
        assert first.sum() == last.sum() == len(row_kinds) == len(set(major))
        visited = np.zeros_like(row_kinds)
        np.add.at(visited, (major, minor), kind)
        np.testing.assert_array_equal(visited, row_kinds)


def test_long_sequences_are_cut_to_what_scalar_memory_holds(monkeypatch):
    clean, _, where = draw("tpu", 2, "in order")
    monkeypatch.setattr(sys.modules[Tpu.__module__], "MOST_VISITS", 2)
    q, k, v = clean[:3]
    out = jax.jit(functools.partial(flash.attention, CASES["tpu"][0], **where))(q, k, v)
    np.testing.assert_allclose(out, reference.attention(q, k, v, **where), atol=1e-5)


@pytest.mark.parametrize("generation", [None, "v4", "v5e", "v5p", "v6e", "7x"])
def test_block_sizes_divide_as_the_kernels_need(generation):
    for queries, keys, group, dim in ((1, 1, 1, 64), (640, 5000, 71, 96), (8192, 131072, 8, 256)):
        tuning = tuning_for(generation, queries, keys, group, dim)
        first, second = tuning.forward, tuning.backward
        assert group % first.heads == 0
        assert first.heads == second.heads
        assert first.queries % second.queries == 0
        assert first.keys % second.keys == 0
        for blocks in (first, second):
            assert blocks.keys % blocks.keys_at_once == 0
            assert blocks.queries % 128 == blocks.keys_at_once % 128 == 0


def test_the_chunked_implementation_takes_mixed_types_and_saves_memory():
    q = jax.ShapeDtypeStruct((1, 2048, 4, 32), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2048, 2, 32), jnp.float32)
    positions = jnp.arange(2048)[None]
    where = {"query_positions": positions, "key_positions": positions}

    def compiled(implementation):
        def loss(q, k):
            out = attention(q, k, k, **where, implementation=implementation)
            assert out.dtype == jnp.bfloat16
            return jnp.sum(out.astype(jnp.float32))

        return jax.jit(jax.grad(loss, (0, 1))).lower(q, k).compile()

    plain, chunked = (compiled(name).memory_analysis() for name in ("plain", "chunked"))
    assert chunked.temp_size_in_bytes < plain.temp_size_in_bytes / 3


def test_on_a_cpu_the_public_function_is_the_plain_one_to_the_letter():
    q = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.float32)
    positions = jnp.tile(jnp.arange(64), (2, 1))
    where = {"query_positions": positions, "key_positions": positions}

    def text(function):
        def run(q):
            return jnp.sum(function(q, q, q, **where))

        return jax.jit(jax.grad(run)).lower(q).as_text()

    assert text(attention) == text(reference.attention)


def test_a_kernel_for_another_platform_is_refused_by_name():
    q = jnp.zeros((1, 4, 2, 8))
    where = {"query_positions": jnp.zeros((1, 4), int), "key_positions": jnp.zeros((1, 4), int)}
    with pytest.raises(ValueError, match="'tpu': this program is compiled for cpu"):
        attention(q, q, q, **where, implementation="tpu")
