"""Round to nearest: each weight by itself, without calibration. What all else is compared to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from surgery.calibration import Stats
from surgery.quantize.method import Method, Report, check_choice, check_group
from weights import float4, grouped, normal_float
from weights.grid import Grid

Array = jax.Array
FITS = ("minmax", "mse")


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Round to nearest on a uniform grid.

    bits: of a code, 2 to 8.
    group: input channels that share a scale; -1 is all.
    symmetric: around 0, without zero points.
    fit: the range of a group: "minmax", or "mse", the share of it that loses least.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = False
    fit: str = "minmax"

    def __post_init__(self) -> None:
        Grid(self.bits)
        check_choice("fit", self.fit, FITS)

    def check(self, path: str, shape: tuple[int, int]) -> None:
        """Groups must fill the matrix."""
        check_group(path, shape[0], self.group)

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Grouped` codes of `w [K, N]`."""
        shrink = self.fit == "mse"
        weight = grouped.quantize(w, self.bits, self.group, symmetric=self.symmetric, shrink=shrink)
        return weight, {}


@dataclass(frozen=True)
class _FourBitTable(Method):
    """Codes of a table of 16 values, as bitsandbytes makes them.

    block: input channels that share a scale.
    double: the scales are coded again in 8 bits.
    """

    block: int = 64
    double: bool = True

    def check(self, path: str, shape: tuple[int, int]) -> None:
        """Blocks must fill the matrix."""
        check_group(path, shape[0], self.block)


@dataclass(frozen=True)
class NormalFloat4(_FourBitTable):
    """NF4, the quantiles of a normal distribution (QLoRA, arXiv 2305.14314)."""

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Lut` codes of `w [K, N]`."""
        return normal_float.quantize(w, self.block, double=self.double), {}


@dataclass(frozen=True)
class Float4(_FourBitTable):
    """FP4 as bitsandbytes has it, 1 sign bit and 8 magnitudes."""

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Lut` codes of `w [K, N]`."""
        return float4.quantize(w, self.block, double=self.double), {}
