"""Mixture weights from the sizes of sources, for configs: `weights=unimax(tokens, budget, 4)`."""

from __future__ import annotations

from collections.abc import Sequence


def proportional(sizes: Sequence[float]) -> tuple[float, ...]:
    """Each source in proportion to its size; the weights sum to 1."""
    return temperature(sizes, 1.0)


def temperature(sizes: Sequence[float], tau: float) -> tuple[float, ...]:
    """`p_i ∝ n_i^(1/τ)`: τ = 1 is proportional, a large τ tends to uniform (Devlin 2018; XLM-R)."""
    if tau <= 0:
        raise ValueError(f"temperature {tau}: must be above 0")
    powers = [_positive(size) ** (1 / tau) for size in sizes]
    return tuple(power / sum(powers) for power in powers)


def unimax(sizes: Sequence[float], budget: float, max_epochs: float) -> tuple[float, ...]:
    """As uniform as possible with no source seen more than `max_epochs` times (Chung et al. 2023).

    Sources are visited from the smallest; each gets the lesser of an equal share of what is left of
    the budget and `max_epochs` times its size. Sizes and budget are in the same unit (tokens).
    """
    amounts, left = [0.0] * len(sizes), budget
    for visited, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        amounts[i] = min(left / (len(sizes) - visited), max_epochs * _positive(sizes[i]))
        left -= amounts[i]
    return tuple(amount / sum(amounts) for amount in amounts)


def _positive(size: float) -> float:
    if size <= 0:
        raise ValueError(f"source of size {size}: sizes must be above 0")
    return float(size)
