"""Error bars and agreement, against closed forms, SciPy, and figures recomputed from PandaLM's
released files.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from evals import metrics, stats

PANDALM = Path(__file__).parent.parent / ".." / "shared" / "data" / "evals" / "pandalm"


def test_intervals_of_independent_items_are_those_of_scipy():
    x = np.random.default_rng(0).normal(2.0, 3.0, 50)
    found = stats.mean(x)
    assert found.se == pytest.approx(scipy_stats.sem(x), rel=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.959963985 * found.se, rel=1e-9)
    theirs = scipy_stats.binomtest(7, 20).proportion_ci(method="wilson")
    assert stats.wilson(7, 20) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    none, every = stats.proportion([0] * 9), stats.proportion([1] * 9)
    assert none.low == 0.0 < none.high
    assert every.low < 1.0 == every.high
    with pytest.raises(ValueError, match="zeros and ones"):
        stats.proportion([0.5])


def test_items_of_one_cluster_do_not_count_as_independent():
    x = np.random.default_rng(1).normal(size=30)
    alone = stats.clustered(x, range(30))
    assert alone.se == pytest.approx(stats.mean(x).se, rel=1e-12)
    repeated = stats.clustered(np.repeat(x, 4), np.repeat(np.arange(30), 4))
    assert repeated.se == pytest.approx(stats.mean(x).se, rel=1e-12)
    assert stats.mean(np.repeat(x, 4)).se < 0.6 * repeated.se
    drawn = stats.bootstrap(
        lambda i: float(np.repeat(x, 4)[i].mean()), 120, np.repeat(np.arange(30), 4)
    )
    assert drawn.se == pytest.approx(repeated.se, rel=0.1)


def test_ratios_of_sums_and_groups():
    rng = np.random.default_rng(2)
    nats, size = rng.gamma(4.0, size=400), rng.integers(5, 20, 400)
    found = stats.ratio(nats, size)
    drawn = stats.bootstrap(lambda i: nats[i].sum() / size[i].sum(), 400)
    assert found.value == nats.sum() / size.sum()
    assert found.se == pytest.approx(drawn.se, rel=0.1)
    perplexity = stats.transformed(found, math.exp)
    assert perplexity.se == pytest.approx(math.exp(found.value) * found.se, rel=1e-4)
    groups = [stats.mean(nats[:100]), stats.mean(nats[100:])]
    assert stats.macro(groups).se == pytest.approx(math.hypot(*(g.se for g in groups)) / 2)
    assert stats.micro(groups).value == pytest.approx(nats.mean())
    assert stats.micro(groups).se == pytest.approx(stats.mean(nats).se, rel=0.02)


def test_a_bootstrap_repeats_itself_and_draws_tables_as_it_draws_rows():
    rng = np.random.default_rng(3)
    gold, told = rng.integers(3, size=300), rng.integers(3, size=300)
    told[:200] = gold[:200]
    table = metrics.confusion(gold.tolist(), told.tolist(), range(3))
    quick = stats.bootstrap_table(metrics.f1, table)
    slow = stats.bootstrap(
        lambda i: metrics.f1(metrics.confusion(gold[i].tolist(), told[i].tolist(), range(3))),
        300,
        draws=500,
    )
    assert quick == stats.bootstrap_table(metrics.f1, table)
    assert quick != stats.bootstrap_table(metrics.f1, table, seed=1)
    assert quick.value == slow.value
    assert quick.se == pytest.approx(slow.se, rel=0.15)


@settings(max_examples=50, deadline=None)
@given(b=st.integers(0, 300), c=st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(b, c):
    theirs = scipy_stats.binomtest(min(b, c), b + c).pvalue if b + c else 1.0
    assert stats.mcnemar(b, c) == pytest.approx(theirs, rel=1e-9)


def test_two_models_are_compared_item_by_item():
    first = np.asarray([0.0] * 10 + [1.0] * 90)
    second = np.asarray([1.0] * 8 + [0.0] * 4 + [1.0] * 88)
    found = stats.compare(first, second)
    assert (found.better, found.worse, found.difference) == (8, 2, pytest.approx(0.06))
    assert found.se == pytest.approx(scipy_stats.sem(second - first))
    assert found.p == pytest.approx(scipy_stats.binomtest(2, 10).pvalue)
    same = stats.compare(first, first)
    assert (same.difference, same.p) == (0.0, 1.0)
    scores = np.random.default_rng(4).normal(size=200)
    assert stats.compare(scores, scores + 0.5 + 0.1 * scores**2).p < 0.01
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="as many"):
        stats.compare(first, second[:-1])


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(10, 3, 1, 0.3), (10, 3, 5, 0.916667), (200, 37, 10, 0.877375), (5, 1, 5, 1), (5, 0, 1, 0)],
)
def test_pass_at_k_has_the_published_values(n, c, k, value):
    assert metrics.pass_at_k(n, c, k) == pytest.approx(value, abs=5e-7)
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert metrics.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_strengths_calibration_and_ranks():
    strengths = np.asarray([4.0, 1.0, 0.25])
    wins = 1000 * strengths[:, None] / (strengths[:, None] + strengths)
    np.fill_diagonal(wins, 0)
    np.testing.assert_allclose(metrics.bradley_terry(wins), strengths, rtol=1e-6)
    with pytest.raises(ValueError, match="2 groups"):
        metrics.bradley_terry(np.asarray([[0, 3], [0, 0]]))
    sure = np.asarray([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert metrics.brier(sure, [0, 1, 1]) == pytest.approx(2 * (0.01 + 0.04 + 0.36) / 3)
    assert metrics.calibration_error([0.9, 0.9, 0.5], [1, 0, 1]) == pytest.approx(1.3 / 3)
    assert metrics.kendall([1, 2, 3, 3], [1, 3, 2, 2]) == pytest.approx(0.2)
    assert metrics.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert math.isnan(metrics.kendall([1, 1], [1, 2]))
    ordered = np.asarray([[5, 1, 0], [1, 4, 1], [0, 1, 5]])
    assert metrics.cohen_kappa(ordered, "quadratic") > metrics.cohen_kappa(ordered)
    assert math.isnan(metrics.cohen_kappa(np.asarray([[7, 0], [0, 0]])))


@pytest.fixture(scope="module")
def pandalm() -> dict[str, list]:
    if not PANDALM.is_dir():
        pytest.skip("the released PandaLM files are not here")

    def rows(name: str) -> list[dict]:
        return json.loads(gzip.decompress((PANDALM / f"{name}-v1.json.gz").read_bytes()))

    people = rows("testset")
    judges = [(rows("gpt-3.5-turbo-testset"), "gpt_result")]
    judges.append((rows("pandalm-7b-testset"), "pandalm_result"))
    verdicts = [
        [int(row[key]) if str(row[key]) in "012" else 0 for row in judge] for judge, key in judges
    ]
    ratings = [[int(row[f"annotator{i}"]) for row in people] for i in (1, 2, 3)]
    gold = [Counter(each).most_common(1)[0][0] for each in zip(*ratings, strict=True)]
    pairs = [row["cmp_key"].split("_") for row in people]
    return {"gold": gold, "gpt": verdicts[0], "panda": verdicts[1], "by": ratings, "pairs": pairs}


@pytest.mark.parametrize(
    ("judge", "correct", "se", "low", "high", "macro", "weighted", "kappa"),
    [
        ("gpt", 710, 0.014353, 0.681828, 0.737979, (0.587919, 0.573623, 0.575538), 0.699377,
         0.495784),
        ("panda", 667, 0.014911, 0.637864, 0.696186, (0.573831, 0.574969, 0.574305), 0.668238,
         0.435355),
    ],
)  # fmt: skip
def test_released_judges_have_their_recomputed_figures(
    pandalm, judge, correct, se, low, high, macro, weighted, kappa
):
    hits = [float(a == b) for a, b in zip(pandalm["gold"], pandalm[judge], strict=True)]
    found = stats.proportion(hits)
    assert (sum(hits), found.n) == (correct, 999)
    assert (found.se, found.low, found.high) == pytest.approx((se, low, high), abs=5e-7)
    table = metrics.confusion(pandalm["gold"], pandalm[judge], range(3))
    assert metrics.precision_recall_f1(table) == pytest.approx(macro, abs=5e-7)
    assert metrics.f1(table, "weighted") == pytest.approx(weighted, abs=5e-7)
    assert metrics.cohen_kappa(table) == pytest.approx(kappa, abs=5e-7)


def test_annotators_agree_as_recomputed_and_judges_differ(pandalm):
    by = pandalm["by"]
    kappas = [
        metrics.cohen_kappa(metrics.confusion(by[i], by[j], range(3)))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert sorted(kappas) == pytest.approx([0.852023, 0.861661, 0.878944], abs=5e-7)
    counts = np.asarray([np.bincount(each, minlength=3) for each in zip(*by, strict=True)])
    assert metrics.fleiss_kappa(counts) == pytest.approx(0.864175, abs=5e-7)
    gold = np.asarray(pandalm["gold"])
    found = stats.compare(*(np.asarray(pandalm[j]) == gold for j in ("panda", "gpt")))
    assert (found.better, found.worse) == (154, 111)
    assert (found.p, found.difference, found.se) == pytest.approx(
        (0.009747, 0.043043, 0.016246), abs=5e-7
    )


@pytest.mark.parametrize(
    ("verdicts", "strengths"),
    [
        ("gold", {"llama": 0.7243, "pythia": 0.0736, "bloom": -0.0182, "opt": -0.2430,
                  "cerebras": -0.5368}),
        ("panda", {"llama": 0.3922, "bloom": 0.1173, "pythia": 0.0544, "opt": -0.1452,
                   "cerebras": -0.4188}),
    ],
)  # fmt: skip
def test_strengths_of_models_from_verdicts(pandalm, verdicts, strengths):
    names = list(strengths)
    wins = np.zeros((5, 5))
    for pair, verdict in zip(pandalm["pairs"], pandalm[verdicts], strict=True):
        one, two = (next(i for i, n in enumerate(names) if side.startswith(n)) for side in pair)
        share = {0: 0.5, 1: 1.0, 2: 0.0}[verdict]
        wins[one, two] += share
        wins[two, one] += 1 - share
    found = np.log(metrics.bradley_terry(wins))
    assert found == pytest.approx(list(strengths.values()), abs=5e-5)


def test_a_bootstrap_of_few_items_claims_no_more_than_their_signs():
    one = stats.compare([1.4], [1.5])
    assert one.p == 1.0
    assert np.isnan(one.low)
    assert stats.compare([1.4, 1.3, 1.2], [1.5, 1.5, 1.5]).p == 0.25
