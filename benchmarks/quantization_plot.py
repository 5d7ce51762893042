"""The rows of `benchmarks/quantization.py` as a plot over honest bits a weight."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's for colour-blind readers, without the yellow, which is lost on white."""
MARKERS = "osD^vP*Xh<>p"
STYLES = ("-", "--", ":")
STEP = 1e-3
"""ΔNLL below which the plot's axis is linear, in nats a token: it is hardly a loss."""
WORST = 3.0
"""ΔNLL beyond which points stand at the edge of the plot: the text is no longer text."""
TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16)
"""Bits."""


@dataclass(frozen=True)
class Point:
    """A model: honest bits a weight, ΔNLL and its error."""

    bits: float
    delta: float
    error: float

    @property
    def held(self) -> float:
        """ΔNLL, at most `WORST`."""
        return min(self.delta, WORST)


def draw(rows: Sequence[Row], out: Path, title: str = "") -> Path:
    """Draw perplexity and ΔNLL over honest bits: rows as points, and for each method a line along
    the means over seeds that no other mean of it beats.

    Some rows must be `drawable`, and one the unquantized model's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes long to import
    from matplotlib.figure import Figure

    found = drawable(rows)
    base = next(float(row["nll"]) for row in rows if row["method"] == "none")
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for index, name in enumerate(dict.fromkeys(row["name"] for row in found)):
        look = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 6,
        }
        own = [row for row in found if row["name"] == name]
        _points(above, below, base, [point(row) for row in own], {**look, "alpha": 0.35})
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        _line(above, below, base, frontier(means(own)), {**look, "label": name, "linestyle": style})
    ends = [point(row).held + sign * point(row).error for row in found for sign in (-1, 1)]
    _axes(above, below, base, ends)
    above.set_title(textwrap.fill(title, 76), fontsize=9)
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", title="method")
    figure.savefig(out, dpi=150)
    return out


def drawable(rows: Sequence[Row]) -> list[Row]:
    """Quantized models that were measured, with a finite loss; those without planted outliers."""
    measured = [r for r in rows if r["state"] == "measured" and r["method"] != "none"]
    measured = [row for row in measured if row["inject"] is None]
    return [row for row in measured if math.isfinite(float(row["nll"]))]


def point(row: Row) -> Point:
    """Of a row."""
    return Point(*(float(row[key]) for key in ("honest_bits", "delta_nll", "delta_error")))


def means(rows: Sequence[Row]) -> list[Point]:
    """One point for all seeds of the same bits and group."""
    found: dict[Any, list[Point]] = {}
    for row in rows:
        found.setdefault((row["bits"], row["group"]), []).append(point(row))
    return [
        Point(fmean(p.bits for p in same), fmean(p.delta for p in same), 0.0)
        for same in found.values()
    ]


def frontier(points: Sequence[Point]) -> list[Point]:
    """By bits, those that no point of as few bits beats."""
    found: list[Point] = []
    for one in sorted(points, key=lambda one: (one.bits, one.delta)):
        if not found or one.delta < found[-1].delta:
            found.append(one)
    return found


def _points(above: Any, below: Any, base: float, points: list[Point], look: Any) -> None:
    bits, held = [p.bits for p in points], [p.held for p in points]
    above.plot(bits, [math.exp(base + delta) for delta in held], linestyle="none", **look)
    errors = [p.error for p in points]
    below.errorbar(bits, held, errors, linestyle="none", capsize=2, **look)


def _line(above: Any, below: Any, base: float, points: list[Point], look: Any) -> None:
    bits, held = [p.bits for p in points], [p.held for p in points]
    above.plot(bits, [math.exp(base + delta) for delta in held], **look)
    below.plot(bits, held, **look)


def _axes(above: Any, below: Any, base: float, ends: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    above.set_yscale("log")
    low, high = above.get_ylim()
    narrow = high < 5 * low
    above.yaxis.set_major_locator(MaxNLocator(8) if narrow else LogLocator(subs=(1, 2, 3, 5)))
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.yaxis.set_minor_locator(NullLocator())
    above.set_ylabel("perplexity, held-out text")
    above.axhline(math.exp(base), color="0.4", linewidth=1)
    place = {"transform": above.get_yaxis_transform(), "ha": "center", "va": "top"}
    above.text(0.75, math.exp(base), "unquantized", color="0.3", fontsize=8, **place)
    below.set_yscale("symlog", linthresh=STEP)
    below.set_ylim(min(-STEP, 1.2 * min(ends)), max(STEP, 1.5 * max(ends)))
    below.set_ylabel("ΔNLL to the unquantized model, nats a token")
    below.axhline(0, color="0.4", linewidth=1)
    below.set_xscale("log")
    below.set_xlabel("bits a weight of the quantized matrices, all that is stored counted")
    below.xaxis.set_major_locator(FixedLocator(TICKS))
    below.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    below.xaxis.set_minor_locator(NullLocator())
    for axis in (above, below):
        axis.grid(alpha=0.3, linewidth=0.5)
