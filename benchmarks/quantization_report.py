"""The rows of `benchmarks/quantization.py` as a table and as a plot over honest bits per weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
COLUMNS = (
    "method",
    "bits",
    "honest bits",
    "group",
    "calibration",
    "NLL",
    "ΔNLL",
    "perplexity",
    "KL",
    "top-1",
    "MB on disk",
    "quantize",
    "decode tokens/s",
)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's for colour-blind readers, without the yellow, which is lost on white."""
MARKERS = "osD^vP*Xh<>p"
STEP = 1e-3
"""ΔNLL below which the plot's axis is linear, in nats a token: it is hardly a loss."""
WORST = 3.0
"""ΔNLL beyond which points stand at the edge of the plot: the text is no longer text."""


def show(rows: Sequence[Row], markdown: bool) -> None:
    """Print the table, and under it why rows were not measured."""
    cells = [cells_of(row) for row in rows]
    print_cells(cells, markdown)
    for reason, names in reasons(rows).items():
        print(f"\n{', '.join(names)}: {reason}")


def print_cells(cells: Sequence[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + " --- |" + " ---: |" * (len(COLUMNS) - 1))
        for row in cells:
            print("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |")
        return
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console(width=max(Console().width, 190), markup=False).print(table)


def cells_of(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    group = {None: "-", 0: "column"}.get(row["group"], str(row["group"]))
    calibration = "-" if row["calibration"] is None else f"{row['calibration'][:6]} #{row['seed']}"
    if row["state"] != "measured":
        bits = "-" if row["bits"] is None else f"{row['bits']}"
        empty = ("-",) * (len(COLUMNS) - 6)
        return (row["name"], bits, "-", group, calibration, row["state"], *empty)
    plain = row["method"] == "none"
    speed = "-"
    if row.get("decode_tokens_per_s") is not None:
        speed = f"{row['decode_tokens_per_s']:.0f} ({row['decode_ratio']:.2f} x)"
    return (
        row["name"],
        f"{float(row['nominal_bits']):.3g}",
        f"{float(row['honest_bits']):.3f}",
        group,
        calibration,
        f"{float(row['nll']):.4f}",
        "-" if plain else f"{float(row['delta_nll']):+.4f} ± {float(row['delta_error']):.4f}",
        f"{float(row['perplexity']):.4g}",
        "-" if plain else f"{float(row['kl']):.4f}",
        "-" if plain else f"{float(row['top1']):.1%}",
        f"{row['bytes_on_disk'] / 1e6:.2f}",
        "-" if plain else f"{row['quantize_seconds']:.1f} s",
        speed,
    )


def draw(rows: Sequence[Row], out: Path, title: str = "") -> Path:
    """Draw perplexity and ΔNLL over honest bits: all rows as points, a line along those of each
    method that no other of it beats.

    Raises `ValueError` if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes long to import
    from matplotlib.figure import Figure

    found = [r for r in rows if r["state"] == "measured" and math.isfinite(float(r["nll"]))]
    plain = [row for row in found if row["method"] == "none"]
    names = list(dict.fromkeys(row["name"] for row in found if row["method"] != "none"))
    if not names:
        raise ValueError(f"no quantized model was measured: {out} is not drawn")
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    best = min(float(row["nll"]) for row in plain) if plain else None
    for index, name in enumerate(names):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        style = ("-", "--", ":")[index // len(COLOURS) % 3]
        own = [row for row in found if row["name"] == name]
        line = frontier(own)
        look = {"color": colour, "marker": marker, "markersize": 6}
        bits, deltas, errors, perplexities = series(own)
        above.plot(bits, perplexities, linestyle="none", alpha=0.35, **look)
        below.errorbar(bits, deltas, errors, linestyle="none", alpha=0.35, capsize=2, **look)
        bits, deltas, _, perplexities = series(line)
        above.plot(bits, perplexities, linestyle=style, label=name, **look)
        below.plot(bits, deltas, linestyle=style, **look)
    _axes(above, below, best)
    above.set_title(title)
    figure.legend(loc="outside right upper", title="method")
    figure.savefig(out, dpi=150)
    return out


def frontier(rows: Sequence[Row]) -> list[Row]:
    """By bits, those that no row of as few bits beats."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["honest_bits"], float(row["delta_nll"]))):
        if not found or float(row["delta_nll"]) < float(found[-1]["delta_nll"]):
            found.append(row)
    return found


def series(rows: Sequence[Row]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Bits, ΔNLL and its error, perplexity; ΔNLL at most `WORST`."""
    deltas = [float(row["delta_nll"]) for row in rows]
    held = [min(delta, WORST) for delta in deltas]
    beyond = [delta - kept for delta, kept in zip(deltas, held, strict=True)]
    return (
        [float(row["honest_bits"]) for row in rows],
        held,
        [float(row["delta_error"]) for row in rows],
        [math.exp(float(row["nll"]) - more) for row, more in zip(rows, beyond, strict=True)],
    )


def _axes(above: Any, below: Any, best: float | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    above.set_yscale("log")
    above.set_ylabel("perplexity, held-out text")
    low, high = above.get_ylim()
    narrow = high < 5 * low
    above.yaxis.set_major_locator(MaxNLocator(8) if narrow else LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.yaxis.set_minor_locator(NullLocator())
    if best is not None:
        above.axhline(math.exp(best), color="0.4", linewidth=1)
        below.axhline(0, color="0.4", linewidth=1)
        edge = (below.get_xlim()[1], math.exp(best))
        above.annotate("unquantized", edge, ha="right", va="bottom", color="0.3", fontsize=8)
    below.set_yscale("symlog", linthresh=STEP)
    below.set_ylabel("ΔNLL to the unquantized model, nats a token")
    below.set_xlabel("bits a weight of the quantized matrices, all that is stored counted")
    for axis in (above, below):
        axis.grid(alpha=0.3, which="both", linewidth=0.5)


def reasons(rows: Sequence[Row]) -> dict[str, list[str]]:
    """`{why rows were not measured: their labels}`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "measured":
            found.setdefault(f"{row['state']}, {row['error']}", []).append(row["label"])
    return found
