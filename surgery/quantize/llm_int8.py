"""LLM.int8(): 8 bits for weights and activations, 16 for the few inputs with outliers (Dettmers et
al., arXiv 2208.07339).

The paper finds outliers in every call. Known from calibration they need no gather that depends on
the data, and their rows are kept as they were instead of being decoded from 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from surgery.calibration import Stats
from surgery.quantize.method import Method, Report, check_choice
from weights import int8
from weights.act_quant import ActQuant
from weights.int8 import Int8, Outlier

Array = jax.Array
OUTLIERS = ("static", "dynamic", "none")


@dataclass(frozen=True)
class LLMInt8(Method):
    """LLM.int8(), vector-wise 8 bits with outlier channels in 16.

    outliers: "static", found in calibration; "dynamic", in every call; "none".
    threshold: magnitude from which an input is an outlier.
    capacity: outlier channels of a matrix at most, and no more than an eighth of them.
    """

    outliers: str = "static"
    threshold: float = 6.0
    capacity: int = 128

    def __post_init__(self) -> None:
        check_choice("outliers", self.outliers, OUTLIERS)
        if self.threshold <= 0:
            raise ValueError(f"threshold={self.threshold}; it must be above 0 (or outliers=none)")
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}; it must be 1 or more (or outliers=none)")

    @property
    def inputs(self) -> str:
        """Those of the unquantized model, if outliers are to be found."""
        return "fp" if self.outliers == "static" else "none"

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Int8` of `w [K, N]` whose input is coded in 8 bits for each token."""
        capacity = min(self.capacity, max(1, w.shape[0] // 8))
        if self.outliers == "none":
            return int8.quantize(w, act=ActQuant()), {}
        if self.outliers == "dynamic":
            coded = int8.quantize(w, act=ActQuant())
            outlier = Outlier(threshold=float(self.threshold), capacity=capacity)
            return Int8(coded.q, coded.scale, coded.act, outlier), {}
        assert stats is not None
        return with_outliers(w, stats.absmax, self.threshold, capacity)


def with_outliers(
    w: Array, absmax: Array, threshold: float, capacity: int
) -> tuple[Int8, dict[str, Array]]:
    """`w [K, N]` in 8 bits, but for the rows of the `capacity` largest inputs that reach the
    threshold; the report counts them and those that found no room.
    """
    rows = w.shape[0]
    peaks, index = jax.lax.top_k(absmax, capacity)
    kept = peaks >= threshold
    beside = jnp.where(kept[:, None], w[index], 0.0).astype(jnp.bfloat16)
    index = jnp.where(kept, index, rows).astype(jnp.int32)
    coded = int8.quantize(w.at[index].set(0.0, mode="drop"), act=ActQuant())
    count, found = jnp.sum(kept), jnp.sum(absmax >= threshold)
    weight = Int8(coded.q, coded.scale, coded.act, Outlier(index, beside))
    return weight, {"outliers": count, "outliers_left": found - count}
