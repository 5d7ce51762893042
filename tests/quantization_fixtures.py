"""Fixture M: one linear layer with correlated inputs and outlier channels, whose error under each
method is known from float64 NumPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Linear:
    """w [K, N], inputs X [tokens, K] and `H = 2 X^T X / tokens`, all float64."""

    w: np.ndarray
    inputs: np.ndarray
    hessian: np.ndarray

    def loss(self, approximation: np.ndarray) -> float:
        """`tr(D^T H D) / tr(W^T H W)`."""
        delta = np.asarray(approximation, np.float64) - self.w
        return float(
            np.sum(delta * (self.hessian @ delta)) / np.sum(self.w * (self.hessian @ self.w))
        )


@functools.cache
def fixture_m(width: int = 512, tokens: int = 8192) -> Linear:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(width, width))
    eigenvalues = np.exp(-np.arange(width) / 60) + 0.01
    q = np.linalg.qr(a)[0]
    c = (q * np.sqrt(eigenvalues)) @ q.T
    s = np.exp(0.5 * rng.normal(size=width))
    s[rng.choice(width, 4, replace=False)] *= 10
    x = rng.normal(size=(tokens, width)) @ c * s
    w = (0.02 * rng.standard_t(5, size=(width, width))).T
    return Linear(np.ascontiguousarray(w), x, 2 * x.T @ x / tokens)
