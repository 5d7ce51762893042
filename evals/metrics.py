"""Measures that exist only over a set: F1, agreement, pass@k, strengths, calibration, rank.

Plain functions of labels or tables, in float64; `evals/stats.py` puts errors on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components

Average = Literal["macro", "weighted"]


def confusion(gold: Sequence[Any], given: Sequence[Any], classes: Sequence[Any]) -> np.ndarray:
    """`int64[classes, classes]`, counts of (gold, given). Raises `ValueError` for a label that is
    not among the classes.
    """
    if len(gold) != len(given):
        raise ValueError(f"{len(gold)} gold labels for {len(given)} answers")
    place = {label: index for index, label in enumerate(classes)}
    table = np.zeros((len(place), len(place)), np.int64)
    for pair in zip(gold, given, strict=True):
        unknown = next((label for label in pair if label not in place), None)
        if unknown is not None:
            raise ValueError(f"label {unknown!r} is not among the classes {list(classes)}")
        table[place[pair[0]], place[pair[1]]] += 1
    return table


def precision_recall_f1(
    table: np.ndarray, average: Average = "macro"
) -> tuple[float, float, float]:
    """Of a confusion table: means over classes of each one's precision, recall and F1 (0 where
    undefined), equally weighted or by gold frequency.
    """
    hits, given, gold = np.diag(table).astype(float), table.sum(0), table.sum(1)
    precision = _divide(hits, given)
    recall = _divide(hits, gold)
    f1 = _divide(2 * hits, given + gold)
    weights = gold / gold.sum() if average == "weighted" else np.full(len(gold), 1 / len(gold))
    return float(weights @ precision), float(weights @ recall), float(weights @ f1)


def f1(table: np.ndarray, average: Average = "macro") -> float:
    """The last of `precision_recall_f1`."""
    return precision_recall_f1(table, average)[2]


def cohen_kappa(table: np.ndarray, weights: Literal["none", "quadratic"] = "none") -> float:
    """Agreement of two raters beyond chance, `(p_o - p_e) / (1 - p_e)` (Cohen 1960); quadratic
    weights are for ordered classes. nan where chance alone explains all.
    """
    shares = np.asarray(table, np.float64) / np.sum(table)
    places = np.arange(len(shares))
    unequal = (places[:, None] != places).astype(float)
    cost = unequal if weights == "none" else (places[:, None] - places) ** 2.0
    expected = float((cost * np.outer(shares.sum(1), shares.sum(0))).sum())
    return 1 - float((cost * shares).sum()) / expected if expected else math.nan


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement of several raters: `counts[items, classes]`, as many ratings for each item."""
    counts = np.asarray(counts, np.float64)
    raters = counts.sum(1)
    if len(set(raters)) != 1 or raters[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of ratings, 2 or more, for each item")
    r = raters[0]
    agreed = float((((counts**2).sum(1) - r) / (r * (r - 1))).mean())
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return (agreed - chance) / (1 - chance) if chance < 1 else math.nan


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k of n samples is right, c of which are: `1 - C(n-c, k) / C(n, k)`
    (Chen et al. 2021), as `1 - prod_{i=n-c+1..n} (1 - k/i)`.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}; it needs 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def bradley_terry(wins: np.ndarray, tolerance: float = 1e-10, most: int = 10_000) -> np.ndarray:
    """Strengths `float64[players]` with geometric mean 1, from `wins[i, j]`, how often i beat j (a
    tie is half a win each), by minorise-maximise: `s_i <- w_i / sum_j n_ij / (s_i + s_j)` (Hunter
    2004). Raises `ValueError` if the players fall into groups that do not beat each other.
    """
    wins = np.asarray(wins, np.float64)
    parts, _ = connected_components(sparse.csr_array(wins > 0), connection="strong")
    if parts > 1:
        raise ValueError(
            f"strengths do not exist: the players fall into {parts} groups, of which one never "
            "beats another; add comparisons"
        )
    games, won = wins + wins.T, wins.sum(1)
    np.fill_diagonal(games, 0)
    strengths = np.ones(len(wins))
    for _ in range(most):
        new = won / (games / (strengths[:, None] + strengths)).sum(1)
        new /= np.exp(np.log(new).mean())
        moved = float(np.abs(np.log(new / strengths)).max())
        strengths = new
        if moved < tolerance:
            return strengths
    raise ValueError(f"strengths did not settle in {most} rounds")


def brier(probabilities: np.ndarray, gold: Sequence[int]) -> float:
    """Mean squared distance of `probabilities[items, classes]` from certainty of the gold class,
    summed over classes (Brier 1950).
    """
    p = np.asarray(probabilities, np.float64)
    return float(((p - np.eye(p.shape[1])[np.asarray(gold)]) ** 2).sum(1).mean())


def calibration_error(
    confidences: Sequence[float], correct: Sequence[float], bins: int = 15
) -> float:
    """Expected calibration error: the mean over items of |accuracy - mean confidence| of their bin
    of equal width (Guo et al. 2017).
    """
    p, hit = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    place = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=hit - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b, which accounts for ties; nan if one side is constant."""
    return float(np.asarray(stats.kendalltau(a, b))[0]) if _vary(a, b) else math.nan


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; nan if one side is constant."""
    return float(np.asarray(stats.spearmanr(a, b))[0]) if _vary(a, b) else math.nan


def _vary(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(set(a)) > 1 and len(set(b)) > 1


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=float), where=bottom > 0)
