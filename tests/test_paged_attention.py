"""Paged and shared-prefix attention against float64 NumPy, the TPU kernels against it in interpret
mode, and the storing of tokens in pages.
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
from kernels_pallas.paged_attention import append, paged_attention, reference, storing, tpu
from kernels_pallas.shared_prefix import Groups, shared_prefix_attention
from kernels_pallas.shared_prefix import tpu as shared_tpu

TOKENS, SEQUENCES, WIDTH, SIZE, KV_HEADS, GROUP, DIM = 24, 6, 8, 4, 2, 3, 8
HEADS, PAGES = KV_HEADS * GROUP, SEQUENCES * WIDTH
SLOPES = np.linspace(0.1, 0.6, HEADS).astype(np.float32)
MASKS = {
    "plain": {},
    "sinks": {"window": 6, "sinks": 3},
    "scores": {"soft_cap": 3.0, "alibi_slopes": SLOPES, "scale": 0.5, "window": 9},
    "everything": {"causal": False},
}


@st.composite
def steps(draw):
    """A seed, and for each sequence its tokens in this step and those before."""
    most, now = TOKENS, []
    for _ in range(SEQUENCES):
        now.append(draw(st.sampled_from([x for x in (0, 1, 1, 2, 5, 11) if x <= most])))
        most -= now[-1]
    before = [draw(st.integers(0, WIDTH * SIZE - n)) for n in now]
    return draw(st.integers(0, 2**32 - 1)), now, before


def arrays(seed, now, before, dtype=np.float32):
    """q, pages, page_table, kv_lens, cu_q_lens; what no sequence uses is NaN."""
    rng = np.random.default_rng(seed)
    lens = np.where(np.asarray(now) > 0, np.add(now, before), 0)
    table = rng.permutation(PAGES).reshape(SEQUENCES, WIDTH)
    pages = np.full((2, PAGES, SIZE, 2 * KV_HEADS, DIM), np.nan)
    for s, length in enumerate(lens):
        for t in range(length):
            pages[:, table[s, t // SIZE], t % SIZE] = rng.normal(size=(2, 2 * KV_HEADS, DIM))
    q = rng.normal(size=(TOKENS, HEADS, DIM))
    numbers = (table, lens, np.concatenate([[0], np.cumsum(now)]))
    return (
        jnp.asarray(q, dtype),
        jnp.asarray(pages, dtype),
        *(jnp.asarray(x, jnp.int32) for x in numbers),
    )


def by_numpy(q, pages, table, lens, starts, layer=1, **options):
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    pages = np.asarray(pages[layer], np.float64)
    for s, length in enumerate(np.asarray(lens)):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        keys = pages[np.asarray(table[s])].reshape(-1, KV_HEADS, 2, DIM)[:length]
        count = rows.stop - rows.start
        out[rows], lse[rows] = attend(
            q[rows],
            keys[:, :, 0],
            keys[:, :, 1],
            length - count + np.arange(count),
            np.arange(length),
            **options,
        )
    return out, lse


def close(found, expected, out=2e-5, lse=1e-5):
    np.testing.assert_allclose(np.asarray(found[0], np.float64), expected[0], atol=out, rtol=out)
    np.testing.assert_allclose(np.asarray(found[1], np.float64), expected[1], atol=lse, rtol=lse)


@functools.cache
def compiled(which, mask):
    options = {**MASKS[mask], "layer": 1, "return_lse": True}
    function = paged_attention
    if which == "tpu":
        function = functools.partial(tpu.paged_attention, block_pages=2, tile=4, interpret=True)
    return jax.jit(functools.partial(function, **options))


@pytest.mark.parametrize("mask", MASKS)
@settings(max_examples=6, deadline=None)
@given(step=steps())
def test_plain_equals_float64_numpy_over_drawn_steps(mask, step):
    given_arrays = arrays(*step)
    close(compiled("plain", mask)(*given_arrays), by_numpy(*given_arrays, **MASKS[mask]))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["scores", "everything"])
@settings(max_examples=3, deadline=None)
@given(step=steps())
def test_the_tpu_kernel_equals_float64_numpy_over_drawn_steps(mask, step):
    given_arrays = arrays(*step)
    close(compiled("tpu", mask)(*given_arrays), by_numpy(*given_arrays, **MASKS[mask]))


@pytest.mark.slow
def test_the_tpu_kernel_in_bfloat16_takes_keys_and_values_apart():
    given_arrays = arrays(1, [5, 1, 0, 1, 9, 2], [12, 0, 0, 30, 0, 7], jnp.bfloat16)
    expected = by_numpy(*given_arrays, **MASKS["sinks"])
    close(compiled("tpu", "sinks")(*given_arrays), expected, out=2e-2, lse=1e-2)


@pytest.mark.slow
def test_prompts_share_tiles_under_the_unified_softmax_and_its_fallback():
    given_arrays = arrays(2, [5, 1, 0, 1, 9, 2], [12, 0, 0, 30, 0, 7])
    options = {"block_pages": 2, "tile": 4, "interpret": True, "layer": 1, "return_lse": True}
    function = jax.jit(functools.partial(tpu.paged_attention, **options))
    for phi in (0.0, -100.0):
        softmax = Unified(jnp.full(HEADS, phi, jnp.float32))
        close(function(*given_arrays, softmax=softmax), by_numpy(*given_arrays))


def test_a_step_that_only_decodes_reads_each_sequence_once():
    given_arrays = arrays(3, [1, 1, 0, 1, 1, 1], [12, 0, 0, 30, 4, 7])
    function = jax.jit(
        functools.partial(paged_attention, layer=1, max_query_length=1, return_lse=True)
    )
    close(function(*given_arrays), by_numpy(*given_arrays))
    assert "while" not in function.lower(*given_arrays).as_text()


def test_the_plain_function_gathers_no_more_pages_than_the_table_is_wide():
    q, pages, table, lens, starts = arrays(3, [1, 1, 1, 1, 1, 1], [5] * 6)
    function = jax.jit(functools.partial(paged_attention, layer=1, max_query_length=1))
    cut = function.lower(q, pages, table[:, :2], lens, starts).compile().cost_analysis()
    whole = function.lower(q, pages, table, lens, starts).compile().cost_analysis()
    assert cut["bytes accessed"] < 0.51 * whole["bytes accessed"]
    few, many = (function(q, pages, t, lens, starts) for t in (table[:, :2], table))
    np.testing.assert_allclose(few, many, atol=1e-6)


def test_bad_arguments_say_what_would_be_right():
    q, pages, table, lens, starts = arrays(0, [1] * 6, [1] * 6)
    with pytest.raises(ValueError, match=r"cu_q_lens \(6,\) \[7\]"):
        paged_attention(q, pages, table, lens, starts[1:], layer=0)
    with pytest.raises(ValueError, match="hold 3 rows a token, a key and a value for each"):
        paged_attention(q, pages[:, :, :, :3], table, lens, starts, layer=0)
    with pytest.raises(ValueError, match="causal=False knows no distances"):
        paged_attention(q, pages, table, lens, starts, layer=0, causal=False, window=3)
    with pytest.raises(ValueError, match="with a leading layer axis"):
        append(q, q, pages, starts, layer=0)


@pytest.mark.parametrize("which", ["plain", "tpu"])
def test_tokens_are_stored_where_their_slots_say_and_nowhere_else(which):
    rng = np.random.default_rng(0)
    slots = np.concatenate([[-1, 3, 17], np.arange(40, 56), [-1, 30], np.arange(60, 64), [2]])
    k, v = rng.normal(size=(2, len(slots), KV_HEADS, DIM)).astype(np.float32)
    pages = rng.normal(size=(2, 6, 16, 2 * KV_HEADS, DIM)).astype(np.float32)
    expected = pages.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[1, slot // 16, slot % 16, 0::2] = k[token]
            expected[1, slot // 16, slot % 16, 1::2] = v[token]
    function = append
    if which == "tpu":
        function = functools.partial(storing.on_tpu, interpret=True)
    given_arrays = (jnp.asarray(x) for x in (k, v, pages, slots.astype(np.int32)))
    np.testing.assert_array_equal(function(*given_arrays, layer=1), expected)


def tree(rng):
    """A step of sequences in two levels of groups: all but the last share two pages, sequences 0, 1
    and 4 two more; the last is in none, and there is a group of one.
    """
    table = rng.permutation(PAGES).reshape(SEQUENCES, WIDTH)
    table[:5, :2] = table[0, :2]
    table[[0, 1, 4], 2:4] = table[0, 2:4]
    now = [1, 3, 1, 1, 2, 1]
    lens = np.asarray([19, 24, 11, 9, 32, 5])
    starts = np.concatenate([[0], np.cumsum(now)])
    member = lambda *sequences: np.concatenate(  # noqa: E731
        [np.arange(starts[s], starts[s + 1]) for s in sequences]
    )
    rows = np.full((2, TOKENS), -1)
    root, leaf = member(0, 1, 2, 3, 4), member(0, 1, 4)
    single = member(2)  # its own second page again, as a group of one
    rows[0, : len(root)], rows[1, : len(leaf)] = root, leaf
    rows[1, len(leaf) : len(leaf) + 1] = single
    pages = np.zeros((2, 2, 2), int)
    pages[0, 0], pages[1, 0], pages[1, 1, 0] = table[0, :2], table[0, 2:4], 0
    group_lens = np.asarray([[8, 0], [8, 0]])
    bounds = [[0, len(root), len(root)], [0, len(leaf), len(leaf)]]
    groups = (pages, group_lens, np.asarray(bounds), rows, np.asarray([16, 16, 8, 8, 16, 0]))
    groups = Groups(*(jnp.asarray(x, jnp.int32) for x in groups))
    filled = rng.normal(size=(2, PAGES, SIZE, 2 * KV_HEADS, DIM))
    q = rng.normal(size=(TOKENS, HEADS, DIM))
    numbers = (jnp.asarray(x, jnp.int32) for x in (table, lens, starts))
    return (jnp.asarray(q), jnp.asarray(filled), *numbers), groups


def one_level(groups):
    """Without the deeper level: what it covered belongs to the suffixes."""
    first = (x[:1] for x in (groups.pages, groups.lens, groups.cu_rows, groups.rows))
    return Groups(*first, jnp.minimum(groups.suffix_start, 8))


@pytest.mark.parametrize("which", ["plain", pytest.param("tpu", marks=pytest.mark.slow)])
def test_shared_beginnings_change_nothing_but_what_is_read(which):
    given_arrays, groups = tree(np.random.default_rng(0))
    function = shared_prefix_attention
    if which == "tpu":
        function = functools.partial(shared_tpu.shared_prefix_attention, interpret=True)
        groups = one_level(groups)
    options = {"layer": 1, "return_lse": True, "soft_cap": 4.0, "suffix_width": 6}
    found = jax.jit(functools.partial(function, **options))(*given_arrays, groups)
    close(found, by_numpy(*given_arrays, soft_cap=4.0))


def test_groups_that_do_not_fit_are_named():
    given_arrays, groups = tree(np.random.default_rng(0))
    wrong = Groups(groups.pages, groups.lens, groups.cu_rows, groups.rows[:, 1:], groups.lens[0])
    with pytest.raises(ValueError, match=r"groups.rows has shape \(2, 23\); expected \(2, 24\)"):
        shared_prefix_attention(*given_arrays, wrong, layer=1)


def test_a_longer_beginning_is_read_once_more_not_once_more_a_member(monkeypatch):
    # XLA counts the body of a loop once, so all sequences are gathered in one go.
    monkeypatch.setattr(reference, "GATHERED_BYTES", 1 << 40)
    members, suffix, size = 32, 2, 16
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    pages = jax.ShapeDtypeStruct((256, size, 2 * KV_HEADS, 64), jnp.float32)
    q = jax.ShapeDtypeStruct((members, KV_HEADS, 64), jnp.float32)
    alone = functools.partial(paged_attention, max_query_length=1)
    shared = functools.partial(shared_prefix_attention, max_query_length=1, suffix_width=suffix)

    def accessed(function, prefix, *groups):
        step = (whole(members, prefix + suffix), whole(members), whole(members + 1))
        lowered = jax.jit(function).lower(q, pages, *step, *groups)
        return lowered.compile().cost_analysis()["bytes accessed"]

    def of_groups(prefix):
        rows = whole(1, members), whole(members)
        return Groups(whole(1, 1, prefix), whole(1, 1), whole(1, 2), *rows)

    more = accessed(alone, 64) - accessed(alone, 32)
    more_shared = accessed(shared, 64, of_groups(64)) - accessed(shared, 32, of_groups(32))
    assert more / more_shared > members / 3, (more, more_shared)
