"""Uniform grids: every published convention rounds to the nearest code, keeps what must be exact,
and equals its definition in float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weights.grid import (
    CONVENTIONS,
    Grid,
    convention,
    decode,
    encode,
    fit_minmax,
    fit_shrunk,
    nearest_codes,
)

SHAPE = (2, 12, 3)


@functools.partial(jax.jit, static_argnums=1)
def coded(w, grid):
    scale, zero = fit_minmax(w, grid)
    codes = encode(w, scale, zero, grid)
    values = decode(codes, scale, zero)
    return scale, zero, codes, values, encode(values, scale, zero, grid)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(CONVENTIONS)),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 2**16),
    shift=st.floats(-3, 3),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_codes_are_the_nearest_and_come_back_from_what_they_stand_for(
    name, bits, seed, shift, size
):
    grid = convention(name, bits)
    w = np.random.default_rng(seed).standard_normal(SHAPE) + shift
    w = (size * w).astype(np.float32)
    w[0, :, 0] = 0.0
    scale, zero, codes, values, again = (np.asarray(x) for x in coded(jnp.asarray(w), grid))
    step, zero = scale.astype(np.float64)[:, None], zero.astype(np.float64)[:, None]
    lowest, highest = step * (grid.lowest - zero), step * (grid.highest - zero)
    inside = (w >= lowest) & (w <= highest)
    assert (np.abs(values - w) <= 0.501 * step)[inside].all()
    nearer_end = np.where(w < lowest, lowest, highest)
    np.testing.assert_allclose(values[~inside], nearer_end[~inside], rtol=1e-5, atol=1e-6 * size)
    np.testing.assert_array_equal(again, codes)
    assert (values[0, :, 0] == 0).all()
    if grid.include_zero and not grid.clip_zero:
        assert (np.abs(values - w) <= 0.501 * step).all()  # nothing is cut off


def test_conventions_equal_their_published_formulas():
    w = np.random.default_rng(0).standard_normal((64, 5)) + 0.3
    low, high, most = w.min(0), w.max(0), np.abs(w).max(0)
    expected = {
        "gptq": ((high - low) / 15, np.round(-low / ((high - low) / 15))),
        "gptq_symmetric": (2 * most / 15, np.full(5, 8)),
        "absmax": (most / 7, np.full(5, 8)),
        "real_zero": ((high - low) / 15, -low / ((high - low) / 15)),
    }
    for name, (scale, zero) in expected.items():
        found = fit_minmax(jnp.asarray(w, jnp.float32), convention(name, 4))
        np.testing.assert_allclose(found[0], scale, rtol=1e-6)
        np.testing.assert_allclose(found[1], zero, rtol=1e-5)


def test_values_of_one_side_show_what_the_flags_do():
    w = jnp.asarray(np.linspace(2, 3, 16)[:, None], jnp.float32)
    found = {name: fit_minmax(w, convention(name, 4)) for name in ("gptq", "spqr", "awq")}
    assert found["gptq"][1] == 0
    assert found["gptq"][0] == pytest.approx(3 / 15)
    assert found["spqr"][1] == -30
    assert found["spqr"][0] == pytest.approx(1 / 15)
    assert found["awq"][1] == 0


@pytest.mark.parametrize("value", [0.0, 0.7, -1.3, 5.0])
def test_a_constant_group_is_exact_unless_the_convention_says_otherwise(value):
    w = jnp.full((8, 1), value, jnp.float32)
    for name in ("rtn", "awq", "absmax", "real_zero", "gptq"):
        _, _, _, values, _ = coded(w, convention(name, 4))
        np.testing.assert_allclose(values, w, rtol=2e-7)
    scale, _, _, _, _ = coded(w, convention("spqr", 4))
    assert scale[0] == pytest.approx(2 / 15)


def test_a_shrunk_range_loses_no_more_and_is_the_best_of_those_tried():
    w = np.random.default_rng(1).standard_t(3, (32, 4)).astype(np.float32)
    grid = convention("gptq", 3)

    def losses(share):
        low, high = np.minimum(w.min(0), 0) * share, np.maximum(w.max(0), 0) * share
        scale = (high - low) / 7
        zero = np.round(-low / scale)
        codes = np.clip(np.round(w / scale) + zero, 0, 7)
        return (np.abs(scale * (codes - zero) - w) ** 2.4).sum(0)

    best = np.min([losses(1 - i / 100) for i in range(80)], axis=0)
    scale, zero = fit_shrunk(jnp.asarray(w), grid)
    values = np.asarray(decode(encode(jnp.asarray(w), scale, zero, grid), scale, zero))
    np.testing.assert_allclose((np.abs(values - w) ** 2.4).sum(0), best, rtol=1e-3)
    assert (best < losses(1.0)).all()


def test_the_middle_of_two_entries_goes_to_the_lower():
    table = jnp.asarray([-1.0, 0.0, 0.5, 2.0])
    values = jnp.asarray([-5.0, -0.5, -0.49, 0.25, 1.25, 1.26, 9.0])
    np.testing.assert_array_equal(nearest_codes(values, table), [0, 0, 1, 1, 2, 3, 3])


def test_flags_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="bits=1; a grid has codes of 2 to 8 bits"):
        Grid(1)
    with pytest.raises(ValueError, match="symmetry='both' is not one of none, even, odd"):
        Grid(4, symmetry="both")
    with pytest.raises(ValueError, match="convention='gtpq' is not one of rtn, gptq"):
        convention("gtpq", 4)
