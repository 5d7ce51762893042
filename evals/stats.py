"""How sure a measured number is: standard errors, intervals, and tests between two models.

All in float64. Items that belong together (questions on one passage, turns of one dialogue) are
given as `clusters`, one label an item. Bootstraps draw clusters, or counts of a table, by a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from evals.task import Estimate

Z95 = float(special.ndtri(0.975))
DRAWS = 2000
Labels = Sequence | np.ndarray
Statistic = Callable[[np.ndarray], float]


def mean(values: Sequence[float] | np.ndarray, unit: str = "") -> Estimate:
    """The mean, `se = sqrt(sum (x - mean)^2 / ((n - 1) n))`, interval by the normal law."""
    x = _numbers(values)
    value, se = float(x.mean()), standard_error(x)
    return Estimate(value, se, value - Z95 * se, value + Z95 * se, len(x), "mean", unit)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean of independent values; nan for one."""
    x = _numbers(values)
    return math.sqrt(x.var(ddof=1) / len(x)) if len(x) > 1 else math.nan


def proportion(correct: Sequence[float] | np.ndarray, unit: str = "") -> Estimate:
    """The share of ones among zeros and ones, with its Wilson interval."""
    x = _numbers(correct)
    if not np.isin(x, (0.0, 1.0)).all():
        raise ValueError("proportion takes zeros and ones; mean takes other scores")
    low, high = wilson(float(x.sum()), len(x))
    return Estimate(float(x.mean()), standard_error(x), low, high, len(x), "Wilson", unit)


def wilson(correct: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a proportion (1927): centre `(p + z^2/2n) / (1 + z^2/n)`, half-width
    `z sqrt(p (1 - p) / n + z^2/4n^2) / (1 + z^2/n)`.
    """
    p, shrink = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return max(centre - half, 0.0), min(centre + half, 1.0)


def clustered(values: Sequence[float] | np.ndarray, clusters: Labels, unit: str = "") -> Estimate:
    """The mean over items of clusters: `se = sqrt(G/(G-1) sum_g (sum_i (x_i - mean))^2) / n`."""
    x = _numbers(values)
    _, inverse = np.unique(_same_length(clusters, x), return_inverse=True)
    groups = int(inverse.max()) + 1
    value = float(x.mean())
    sums = np.bincount(inverse, weights=x - value)
    scale = groups / (groups - 1) if groups > 1 else math.nan
    se = math.sqrt(scale * float(sums @ sums)) / len(x)
    return Estimate(value, se, value - Z95 * se, value + Z95 * se, len(x), "clusters", unit)


def ratio(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    unit: str = "",
) -> Estimate:
    """A ratio of sums, such as nats over bytes; se by the delta method over the items:
    `sqrt(n/(n-1) sum (a - r b)^2) / sum b`.
    """
    a, b = _numbers(numerators), _numbers(denominators)
    total = float(_same_length(b, a).sum())
    value = float(a.sum()) / total
    rest, n = a - value * b, len(a)
    se = math.sqrt(n / (n - 1) * float(rest @ rest)) / total if n > 1 else math.nan
    return Estimate(value, se, value - Z95 * se, value + Z95 * se, n, "ratio of sums", unit)


def transformed(estimate: Estimate, function: Callable[[float], float], unit: str = "") -> Estimate:
    """An increasing function of an estimate: the ends go through it, the error by its slope."""
    value, step = estimate.value, max(abs(estimate.value), 1.0) * 1e-6
    slope = (function(value + step) - function(value - step)) / (2 * step)
    low, high = function(estimate.low), function(estimate.high)
    return Estimate(
        function(value), estimate.se * abs(slope), low, high, estimate.n, estimate.method, unit
    )


def macro(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over groups: `se = sqrt(sum se_k^2) / K`."""
    value = math.fsum(each.value for each in estimates) / len(estimates)
    se = math.sqrt(math.fsum(each.se**2 for each in estimates)) / len(estimates)
    n = sum(each.n for each in estimates)
    return Estimate(
        value, se, value - Z95 * se, value + Z95 * se, n, "mean of groups", estimates[0].unit
    )


def micro(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over the items of all groups, from the groups' means and errors by the variance
    pooled within them: `sum (n_k - 1) n_k se_k^2 / (N - K)` over N (as lm-eval does it).
    """
    n = np.asarray([each.n for each in estimates], np.float64)
    values = np.asarray([each.value for each in estimates])
    errors = np.asarray([each.se for each in estimates])
    value = float(n @ values / n.sum())
    pooled = float(((n - 1) * n * errors**2).sum() / (n.sum() - len(n)))
    se = math.sqrt(pooled / n.sum())
    return Estimate(
        value, se, value - Z95 * se, value + Z95 * se, int(n.sum()), "pooled", estimates[0].unit
    )


def bootstrap(
    statistic: Statistic,
    items: int,
    clusters: Labels | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """Percentile bootstrap of `statistic(indices int[n])` over `items` items.

    clusters: label of each item; whole clusters are drawn. Draws where the statistic is nan (a
    correlation of equal values, say) are left out.
    """
    labels = np.arange(items) if clusters is None else np.asarray(clusters)
    _, inverse = np.unique(_same_length(labels, np.arange(items)), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    rng = np.random.default_rng(seed)
    values = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(len(members), size=len(members))
        values[draw] = statistic(np.concatenate([members[i] for i in chosen]))
    return _percentiles(float(statistic(np.arange(items))), values, items, "bootstrap", unit)


def bootstrap_table(
    statistic: Callable[[np.ndarray], float],
    table: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    unit: str = "",
) -> Estimate:
    """Percentile bootstrap of a statistic of a table of counts (F1, kappa): multinomial counts are
    drawn in place of rows.
    """
    counts = np.asarray(table, np.int64)
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts.ravel() / n, size=draws)
    values = np.asarray([statistic(each.reshape(counts.shape)) for each in drawn])
    return _percentiles(float(statistic(counts)), values, n, "multinomial bootstrap", unit)


def _percentiles(value: float, values: np.ndarray, n: int, method: str, unit: str) -> Estimate:
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return Estimate(value, math.nan, math.nan, math.nan, n, method, unit)
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(value, float(values.std(ddof=1)), float(low), float(high), n, method, unit)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items: `second - first`.

    p: two-sided; McNemar's exact test where scores are zeros and ones, else from the paired
    bootstrap, and at least 2^(1 - n) of n items or clusters: less than n signs can tell. low, high:
    95 %; nan of a single item. better, worse: items on which the second scored higher, lower.
    """

    first: float
    second: float
    difference: float
    se: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    n: int
    method: str


def compare(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Labels | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """The paired difference of two models' scores on the same items, with its error.

    clusters: label of each item; then the error and the test go by cluster.
    """
    a, b = _numbers(first), _numbers(second)
    gaps = b - _same_length(a, b)
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    labels = np.arange(len(gaps)) if clusters is None else _same_length(clusters, gaps)
    binary = clusters is None and bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    drawn = paired_draws(gaps, labels, draws, seed)
    se = clustered(gaps, labels).se if clusters is not None else standard_error(gaps)
    groups = len(np.unique(labels))
    p = mcnemar(better, worse) if binary else max(_two_sided(drawn), 2.0 ** (1 - groups))
    low, high = (float(end) for end in np.quantile(drawn, (0.025, 0.975)))
    if groups == 1:
        low = high = math.nan
    method = "paired, exact McNemar" if binary else "paired bootstrap"
    return Comparison(
        float(a.mean()), float(b.mean()), float(gaps.mean()), se, low, high, p, better, worse,
        len(gaps), method,
    )  # fmt: skip


def paired_draws(
    gaps: np.ndarray, clusters: Labels, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """`float64[draws]`, mean differences of items whose clusters are drawn with replacement."""
    _, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(inverse, weights=gaps), np.bincount(inverse)
    rng, groups = np.random.default_rng(seed), len(sizes)
    found = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(groups, size=groups)
        found[draw] = sums[chosen].sum() / sizes[chosen].sum()
    return found


def _two_sided(draws: np.ndarray) -> float:
    """Twice the smaller share of draws on one side of 0, never less than one draw can tell."""
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draws) + 1))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test: `min(1, 2 sum_{i <= min(b, c)} C(b+c, i) / 2^(b+c))`,
    where b and c count the items that only one of the two got right.
    """
    if b + c == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(b, c), b + c, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a table of tests, adjusted by Holm's step-down rule (1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, (len(order) - rank) * float(p_values[index]))
        adjusted[index] = min(1.0, highest)
    return adjusted


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"statistics need a list of at least one number; got shape {x.shape}")
    return x


def _same_length(labels: Labels, values: np.ndarray) -> np.ndarray:
    found = np.asarray(labels)
    if len(found) != len(values):
        raise ValueError(f"{len(found)} and {len(values)} values must be as many, one an item")
    return found
