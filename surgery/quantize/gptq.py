"""GPTQ: rows are rounded in turn, and each one's error is made good by the rows to come (Frantar et
al., arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from surgery.calibration import Stats
from surgery.quantize import obs
from surgery.quantize.method import Method, Report, check_choice, check_group, check_range
from surgery.quantize.rtn import FITS
from weights import grouped
from weights.codes import group_size
from weights.grid import CONVENTIONS, Grid, decode, encode, fit_minmax, fit_shrunk
from weights.permuted import Permuted

Array = jax.Array
STATISTICS = ("block", "live")
PRECISIONS = ("float32", "float64")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """What rounding needs of `H [K, K]`, the same for all matrices that read a site.

    factor: `U [K, K]` of `obs.inverse_factor`, in the order of rounding.
    dead: bool[K], inputs that were always 0.
    order: int32[K], the order of rounding; None is as they stand.
    damping: what was used.
    """

    factor: Array
    dead: Array
    order: Array | None
    damping: Array


@dataclass(frozen=True)
class GPTQ(Method):
    """GPTQ, one-shot rounding with second-order error feedback.

    bits: of a code, 2 to 8.
    group: input channels that share a scale; -1 is all.
    symmetric: around 0, without zero points.
    fit: the range of a group: "minmax", or "mse", the share of it that loses least.
    act_order: round the channels with the largest inputs first.
    static_groups: with act_order, groups are of neighbouring channels, fitted beforehand, so that
        no order is stored; otherwise of channels that are rounded one after the other.
    statistics: groups are fitted to weights as the earlier tiles of 128 rows left them ("block",
        the authors' code), or as all earlier rows did ("live").
    damping: share of the mean of the Hessian's diagonal that is added to it.
    precision: of the factorization and of the errors handed on, "float32" or "float64".
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = False
    fit: str = "minmax"
    act_order: bool = False
    static_groups: bool = True
    statistics: str = "block"
    damping: float = 0.01
    precision: str = "float32"

    def __post_init__(self) -> None:
        Grid(self.bits)
        check_choice("fit", self.fit, FITS)
        check_choice("statistics", self.statistics, STATISTICS)
        check_range("damping", self.damping, 0.0, 10.0)
        check_choice("precision", self.precision, PRECISIONS)

    @property
    def inputs(self) -> str:
        """Those that the already quantized layers give."""
        return "quantized"

    @property
    def wide(self) -> bool:
        """With float64."""
        return self.precision == "float64"

    def check(self, path: str, shape: tuple[int, int]) -> None:
        """Groups must fill the matrix."""
        check_group(path, shape[0], self.group)

    @property
    def grid(self) -> Grid:
        """As the authors fit it."""
        name = "gptq_symmetric" if self.symmetric else "gptq"
        return Grid(self.bits, **CONVENTIONS[name])

    def prepare(self, stats: Stats) -> Factored:
        """The factorization, once for a site."""
        return self.factored(stats.hessian().astype(self.precision))

    def linear(self, w: Array, stats: Factored | None) -> tuple[Any, Report]:
        """`Grouped` codes of `w [K, N]`; within `Permuted` with act_order and no static groups."""
        assert stats is not None
        return self.round(w.astype(self.precision), stats)

    def solve(self, w: Array, hessian: Array) -> tuple[Any, Report]:
        """The same, given `H [K, K]` up to a factor; computed in the dtype of both."""
        return self.round(w, self.factored(hessian))

    def factored(self, hessian: Array) -> Factored:
        """What `round` needs of `H [K, K]`."""
        hessian, dead = obs.without_dead(hessian)
        order = jnp.argsort(-jnp.diagonal(hessian), stable=True) if self.act_order else None
        if order is not None:
            hessian = hessian[order][:, order]
        factor, damping = obs.inverse_factor(hessian, self.damping)
        return Factored(factor, dead, order, damping)

    def round(self, w: Array, known: Factored) -> tuple[Any, Report]:
        """The codes of `w [K, N]`, and the report."""
        rows, order = w.shape[0], known.order
        group = group_size(self.group, rows)
        w = jnp.where(known.dead[:, None], 0, w)
        fixed = self._fit(w, group) if self._fits_first(group, rows) else None
        w = w if order is None else w[order]
        place = jnp.arange(rows) if order is None or not self._keeps_groups else order
        rounded, (scale, zero), loss = self._round(w, known.factor, fixed, place // group, group)
        if order is not None and self._keeps_groups:
            rounded = jnp.zeros_like(rounded).at[order].set(rounded)
        weight = grouped.from_codes(
            self._codes(rounded, scale, zero, group),
            scale,
            None if self.symmetric else zero.astype(jnp.uint8),
            bits=self.bits,
            group=group,
        )
        report = {"damping": known.damping, "loss": jnp.sum(loss)}
        if order is not None and not self._keeps_groups:
            return Permuted(weight, order.astype(jnp.int32)), report
        return weight, report

    @property
    def _keeps_groups(self) -> bool:
        """Whether groups are of neighbouring channels though the order is another."""
        return self.act_order and self.static_groups

    def _fits_first(self, group: int, rows: int) -> bool:
        return self._keeps_groups or group == rows

    def _fit(self, w: Array, group: int) -> tuple[Array, Array]:
        """Scale, rounded as it is stored, and zero `[G, N]`."""
        fit = fit_shrunk if self.fit == "mse" else fit_minmax
        scale, zero = fit(w.reshape(-1, group, w.shape[-1]), self.grid)
        limits = jnp.finfo(jnp.float16)
        least, most = float(limits.smallest_subnormal), float(limits.max)
        return jnp.clip(scale, least, most).astype(jnp.float16), zero

    def _round(
        self,
        w: Array,
        factor: Array,
        fixed: tuple[Array, Array] | None,
        groups: Array,
        group: int,
    ) -> tuple[Array, tuple[Array, Array], Array]:
        """The loop over rows, whose groups are `groups int32[K]`."""
        shape = (w.shape[0] // group, w.shape[1])

        def begin(state: Any, index: Array, live: Array) -> Any:
            found = self._fit(live, group)
            return tuple(old.at[index].set(new[0]) for old, new in zip(state, found, strict=True))

        def quantize(state: Any, k: Array, row: Array) -> tuple[Array, Any]:
            scale, zero = (part[groups[k]] for part in state)
            codes = encode(row[None], scale, zero, self.grid)
            return decode(codes, scale, zero)[0].astype(row.dtype), state

        empty = (jnp.ones(shape, jnp.float16), jnp.zeros(shape, jnp.float32))
        return obs.column_loop(
            w,
            factor,
            fixed or empty,
            quantize,
            begin=None if fixed else begin,
            group=group,
            live=self.statistics == "live",
        )

    def _codes(self, rounded: Array, scale: Array, zero: Array, group: int) -> Array:
        """The codes of values that lie on the grid."""
        by_group = rounded.reshape(-1, group, rounded.shape[1])
        return encode(by_group, scale, zero, self.grid).reshape(rounded.shape)
