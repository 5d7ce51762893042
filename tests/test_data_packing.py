"""Packing: every token once an epoch, whole documents where they fit, windows that are full."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Spans, make_plan
from data.packing import Plan, best_fit, cached_plan, first_fit

PACKINGS = ("concat_split", "best_fit", "first_fit", "pad")


def _spans(lengths: list[int] | np.ndarray, starts: list[int] | None = None) -> Spans:
    count = len(lengths)
    begin = np.array(starts if starts is not None else [0] * count, np.int64)
    return Spans(np.arange(count), begin, np.array(lengths, np.int64))


def _tokens(plan: Plan, epoch: int) -> Counter:
    """How often each (document, position) is in the windows of an epoch."""
    seen: Counter = Counter()
    for window in range(plan.windows):
        for document, start, length, _ in plan.window(window, epoch):
            seen.update((document, start + i) for i in range(length))
    return seen


def _targets(plan: Plan, epoch: int) -> Counter:
    seen: Counter = Counter()
    for window in range(plan.windows):
        for document, start, _, targets in plan.window(window, epoch):
            seen.update((document, start + i + 1) for i in range(targets))
    return seen


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=25),
    st.integers(1, 12),
    st.sampled_from(PACKINGS),
    st.sampled_from([None, 0, 5]),
    st.integers(0, 4),
)
def test_every_token_and_every_target_once_an_epoch(parts, length, packing, seed, max_segments):
    spans = _spans([size for _, size in parts], [start for start, _ in parts])
    plan = make_plan(spans, packing, length, seed=seed, max_segments=max_segments)
    tokens = {(i, s + k): 1 for i, (s, size) in enumerate(parts) for k in range(size)}
    targets = {(i, s + k): 1 for i, (s, size) in enumerate(parts) for k in range(1, size)}
    for epoch in (0, 1, 2):
        assert _tokens(plan, epoch) == tokens
        assert _targets(plan, epoch) == targets
        for window in range(plan.windows):
            pieces = plan.window(window, epoch)
            assert 0 < sum(piece[2] for piece in pieces) <= length
            if packing.endswith("fit") and max_segments:
                assert len(pieces) <= max_segments


def test_concat_split_wastes_nothing_and_moves_its_cuts():
    plan = make_plan(_spans([1000]), "concat_split", 64, seed=3)
    assert plan.windows == 16
    sizes = [sum(piece[2] for piece in plan.window(w)) for w in range(16)]
    assert sizes == [64] * 15 + [40]
    starts = [{plan.window(w, epoch)[0][1] % 64 for w in range(10)} for epoch in range(6)]
    assert starts[0] == {0}
    assert len({frozenset(s) for s in starts}) > 3
    still = make_plan(_spans([1000]), "concat_split", 64, seed=3, shift=False)
    assert [still.window(w, 5) for w in range(16)] == [plan.window(w, 0) for w in range(16)]


@pytest.mark.parametrize("packing", ["best_fit", "first_fit"])
def test_documents_that_fit_stay_whole(packing):
    lengths = [7, 8, 9, 80, 1, 0, 3]
    plan = make_plan(_spans(lengths), packing, 8)
    pieces = [piece for w in range(plan.windows) for piece in plan.window(w)]
    by_document = Counter(piece[0] for piece in pieces)
    assert by_document == {0: 1, 1: 1, 2: 2, 3: 10, 4: 1, 6: 1}
    assert sorted(p[1:] for p in pieces if p[0] == 2) == [(0, 8, 8), (8, 1, 0)]


def test_pad_takes_one_document_a_window():
    plan = make_plan(_spans([3, 8, 0, 9]), "pad", 8, seed=None)
    windows = [plan.window(w) for w in range(plan.windows)]
    assert windows == [[(0, 0, 3, 2)], [(1, 0, 8, 7)], [(3, 0, 8, 8)], [(3, 8, 1, 0)]]


def test_windows_are_full():
    lengths = np.random.default_rng(0).lognormal(6, 1, 100_000).astype(np.int64).clip(1)
    for packing, least in (("best_fit", 0.99), ("first_fit", 0.97), ("concat_split", 0.9999)):
        plan = make_plan(_spans(lengths), packing, 2048)
        assert lengths.sum() / (plan.windows * 2048) >= least, packing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(0, 3))
def test_best_and_first_fit_equal_their_definitions(lengths, max_segments):
    tightest = lambda space, used: min(space, key=lambda b: (space[b], -used[b]))  # noqa: E731
    for fit, choose in ((best_fit, tightest), (first_fit, lambda space, _: min(space))):
        bins: list[list[int]] = []
        for item, need in enumerate(lengths):
            space = {
                b: 20 - sum(lengths[i] for i in held)
                for b, held in enumerate(bins)
                if len(held) != max_segments
            }
            space = {b: left for b, left in space.items() if left >= need}
            used = {b: held[-1] for b, held in enumerate(bins)}
            if space:
                bins[choose(space, used)].append(item)
            else:
                bins.append([item])
        assert fit(lengths, 20, max_segments) == bins


def test_a_window_of_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="window length is 0"):
        make_plan(_spans([5]), "best_fit", 0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_saved_plan_is_the_same_and_is_made_once(tmp_path, packing):
    lengths = np.random.default_rng(1).integers(0, 90, 200)
    made = []

    def make() -> Plan:
        made.append(1)
        return make_plan(_spans(lengths), packing, 32)

    fresh = make()
    first = cached_plan(tmp_path, ["key", 1], make)
    again = cached_plan(tmp_path, ["key", 1], make)
    assert len(made) == 2
    for plan in (
        first,
        again,
        pickle.loads(pickle.dumps(again)),
        pickle.loads(pickle.dumps(fresh)),
    ):
        assert plan.windows == fresh.windows
        for window in range(plan.windows):
            assert plan.window(window, 1) == fresh.window(window, 1)
    assert len(pickle.dumps(again)) < 500
