"""Order: permutations are bijections that mix, mixtures follow their closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Mixture, Order, Phase, permute, proportional, temperature, unimax, unpermute
from data.order import key


def test_every_small_permutation_is_a_bijection():
    for size in [*range(1, 400), *range(400, 2001, 97), 2000]:
        seed = key("small", size)
        moved = np.asarray(permute(np.arange(size), size, seed))
        assert np.array_equal(np.sort(moved), np.arange(size))
        assert np.array_equal(unpermute(moved, size, seed), np.arange(size))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2**33), st.integers(0, 2**64 - 1))
def test_a_large_permutation_has_an_inverse(size, seed):
    index = np.random.default_rng(size).integers(0, size, 50_000)
    moved = np.asarray(permute(index, size, seed))
    assert moved.min() >= 0
    assert moved.max() < size
    assert np.array_equal(unpermute(moved, size, seed), index)
    assert len(np.unique(moved)) == len(np.unique(index))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 2**40), st.integers(0, 2**64 - 1))
def test_scalars_and_arrays_agree(data, size, seed):
    index = data.draw(st.integers(0, size - 1))
    moved = permute(index, size, seed)
    assert isinstance(moved, int)
    sizes, seeds = np.array([size, 7, size]), np.array([seed, 3, seed], np.uint64)
    assert np.asarray(permute(np.array([index, 5, index]), sizes, seeds)).tolist() == [
        moved,
        permute(5, 7, 3),
        moved,
    ]


def test_permutations_mix():
    size = 10**6
    index = np.arange(size)
    for number in range(20):
        moved = np.asarray(permute(index, size, key("mix", number)))
        table = np.bincount((index % 16) * 16 + moved % 16, minlength=256)
        chi_squared = ((table - size / 256) ** 2 / (size / 256)).sum()
        assert chi_squared < 293, f"0.999 quantile at 225 degrees of freedom, key {number}"


def test_two_epochs_are_unrelated():
    size = 10**5
    orders = [np.asarray(permute(np.arange(size), size, key(0, "fiction", e))) for e in range(3)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.01


def test_the_permutation_never_changes():
    """Golden: an order that changes would change every run's data under a resumed run."""
    assert np.asarray(permute(np.arange(10), 10, 12345)).tolist() == GOLDEN_PERMUTATION
    assert permute(123_456_789, 10**10, key(0, "stdlib:", 3)) == GOLDEN_LARGE


GOLDEN_PERMUTATION = [2, 6, 7, 9, 0, 4, 8, 1, 5, 3]
GOLDEN_LARGE = 8_520_587_208


@pytest.mark.parametrize(
    ("weights", "golden"),
    [
        ((5, 3, 2), [0, 1, 0, 1, 0, 2, 0, 1, 0, 2] * 2),
        ((7, 2, 1), [0, 0, 0, 1, 0, 0, 1, 0, 0, 2] * 2),
    ],
)
def test_the_mixture_is_grains(weights, golden):
    for mixture in (Mixture(weights), Mixture.from_floats(weights)):
        assert mixture.component(np.arange(20))[0].tolist() == golden


@pytest.mark.interop
def test_a_mixture_equals_grains_mix():
    import grain

    weights = (0.5, 0.3, 0.2)
    sources = [grain.MapDataset.source([(number, i) for i in range(10_000)]) for number in range(3)]
    theirs = grain.MapDataset.mix(sources, weights=weights)
    component, index = Mixture.from_floats(weights).component(np.arange(5000))
    ours = list(zip(component.tolist(), index.tolist(), strict=True))
    assert ours == [theirs[i] for i in range(5000)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30).filter(any), st.integers(0, 10**12))
def test_each_draw_belongs_to_one_component_and_counts_are_exact(weights, begin):
    mixture = Mixture(tuple(weights))
    counts = mixture.counts(np.arange(begin, begin + 300))
    assert np.array_equal(counts.sum(axis=-1), np.arange(begin, begin + 300))
    steps = np.diff(counts, axis=0)
    assert np.all((steps >= 0) & (steps <= 1))
    component, index = mixture.component(np.arange(begin, begin + 299))
    assert np.array_equal(np.argmax(steps, axis=-1), component)
    assert np.array_equal(counts[np.arange(299), component], index)
    assert counts[0].tolist() == _exact_counts(weights, begin)
    assert all(weight > 0 for weight in np.array(weights)[component])


def _exact_counts(weights: list[int], draws: int) -> list[int]:
    """The card's recurrence in Python integers."""
    counts, left, total = [], draws, sum(weights)
    for weight in weights:
        kept = left * (total - weight) // total if total else left
        counts.append(left - kept)
        left, total = kept, total - weight
    return counts


def test_a_mixture_stays_near_its_weights():
    draws = np.arange(0, 10**6, 997)
    for size, bound in ((2, 1.01), (3, 2.0), (7, 3.0), (30, 6.0)):
        weights = np.random.default_rng(size).integers(10_000, 10**6, size)
        exact = draws[:, None] * weights / weights.sum()
        assert np.abs(Mixture(tuple(weights.tolist())).counts(draws) - exact).max() <= bound


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"),), (1e-7, 1.0)])
def test_impossible_weights_are_errors(weights):
    with pytest.raises(ValueError, match="mixture weights"):
        Mixture.from_floats(weights)


def test_phases_switch_at_their_step_and_sources_run_on():
    order = Order((Phase(0, Mixture((3, 1))), Phase(37, Mixture((0, 1)))), batch_size=4)
    seen = [[], []]
    for step in range(60):
        component, index = order.draws(step, np.arange(4))
        assert (set(component) == {1}) == (step >= 37)
        for c, i in zip(component.tolist(), index.tolist(), strict=True):
            seen[c].append(i)
        assert order.drawn(step + 1).tolist() == [len(seen[0]), len(seen[1])]
    assert seen[0] == list(range(37 * 3))
    assert seen[1] == list(range(37 + 23 * 4))


def test_skipped_batches_are_never_read_and_nothing_else_moves():
    order = Order((Phase(0, Mixture((2, 1))),), batch_size=3)
    skipping = order.skip(5, 8).skip(20, 21).skip(7, 10)
    assert skipping.skips == ((5, 10), (20, 21))
    batches = [skipping.batch_index(step) for step in range(30)]
    assert batches == [b for b in range(36) if not (5 <= b < 10 or b == 20)]
    for step in range(30):
        ours = skipping.draws(step, np.arange(3))
        plain = order.draws(batches[step], np.arange(3))
        assert all(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))
    with pytest.raises(ValueError, match=r"cannot skip batches \[3, 3\)"):
        order.skip(3, 3)


def test_proportions():
    assert proportional((1, 3)) == (0.25, 0.75)
    assert temperature((1, 100), 2.0) == pytest.approx((1 / 11, 10 / 11))
    assert unimax((10, 100, 1000), 300, 4) == pytest.approx((40 / 300, 130 / 300, 130 / 300))
    assert unimax((100, 100), 100, 1) == (0.5, 0.5)
