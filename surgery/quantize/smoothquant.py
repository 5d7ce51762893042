"""SmoothQuant: outliers of activations are moved into weights, so that both fit 8 bits (Xiao et
al., arXiv 2211.10438).

    s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from surgery.calibration import Stats
from surgery.quantize import transforms
from surgery.quantize.method import Block, Method, Report, check_range
from weights import flatten, int8
from weights.act_quant import ActQuant

Array = jax.Array
SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Method):
    """SmoothQuant, 8-bit weights and activations.

    alpha: how much of the outliers goes into the weights, 0 to 1.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0.0, 1.0)

    @property
    def inputs(self) -> str:
        """Those of the unquantized model."""
        return "fp"

    @property
    def takes_experts(self) -> bool:
        """No: the experts of a layer would have to agree on one scale."""
        return False

    def transform(self, block: Block, targets: frozenset[str]) -> tuple[Block, Report]:
        """The block with the tensors made by norms smoothed."""
        params, stats, report = block.params, dict(block.stats), {}
        for site, found in block.stats.items():
            fold = transforms.fold_of(params, block.config, site)
            linears = [path for path in site.linears if path in targets]
            if fold is None or fold.kind == "linear" or not linears:
                continue
            now = flatten(params)
            s = smoothing(found.absmax, [now[path] for path in linears], self.alpha)
            params = transforms.scale(params, fold, s)
            stats[site] = found.scaled(1 / s)
            spread = jnp.max(s) / jnp.min(s)
            report.update({path: {"smoothing": spread} for path in linears})
        return Block(params, block.config, stats), report

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Int8` of `w [K, N]` whose input is coded in 8 bits for each token."""
        return int8.quantize(w, act=ActQuant()), {}


def smoothing(absmax: Array, matrices: list[Array], alpha: float) -> Array:
    """`s [K]` from the largest inputs `[K]` and the matrices `[K, N]` that read them; 1 where an
    input was always 0.
    """
    largest = [jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1) for w in matrices]
    of_weights = jnp.maximum(jnp.max(jnp.stack(largest), axis=0), SMALLEST)
    s = jnp.maximum(absmax**alpha / of_weights ** (1 - alpha), SMALLEST)
    return jnp.where(absmax > 0, s, 1.0)
