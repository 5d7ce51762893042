"""The rows of `benchmarks/quantization.py` as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
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
VERDICT_COLUMNS = ("claim", "difference, nats", "seeds", "verdict")


@dataclass(frozen=True)
class Verdict:
    """A claim in words, how far it is from the border in nats a token (below 0: less is lost than
    claimed), the error of that, the calibration seeds, and what follows.
    """

    claim: str
    difference: float
    error: float
    seeds: int
    word: str

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        return self.claim, f"{self.difference:+.4f} ± {self.error:.4f}", str(self.seeds), self.word


def show(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Print the tables, and under the first why rows were not measured."""
    rows = merged(rows)
    console = Console(width=max(Console().width, 190), markup=False)
    console.print(table(COLUMNS, map(cells_of, rows)))
    for reason, names in reasons(rows).items():
        console.print(f"\n{'; '.join(names)}: {reason}")
    if verdicts:
        console.print(table(VERDICT_COLUMNS, (one.cells for one in verdicts)))


def table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """For a terminal."""
    made = Table()
    for index, name in enumerate(names):
        made.add_column(name, justify="right" if index else "left", no_wrap=True)
    for cells in lines:
        made.add_row(*cells)
    return made


def markdown(title: str, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> str:
    """The same for documentation."""
    rows = merged(rows)
    parts = [title, markdown_table(COLUMNS, map(cells_of, rows))]
    parts += [f"{'; '.join(names)}: {reason}" for reason, names in reasons(rows).items()]
    if verdicts:
        parts.append(markdown_table(VERDICT_COLUMNS, (one.cells for one in verdicts)))
    return "\n\n".join(parts) + "\n"


def markdown_table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Without a line break at its end."""
    rule = ["---"] + ["---:"] * (len(names) - 1)
    cells = [names, rule, *([cell.replace("|", "/") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def merged(rows: Sequence[Row]) -> list[Row]:
    """A row of each model: means over the calibration seeds it was measured with. Their spread adds
    to the error of the loss.
    """
    found: dict[Any, list[Row]] = {}
    for number, row in enumerate(rows):
        which = (row["name"], row["bits"], row["group"], row["inject"])
        found.setdefault(which if row["state"] == "measured" else number, []).append(row)
    return [same[0] if len(same) == 1 else _mean(same) for same in found.values()]


def _mean(same: Sequence[Row]) -> Row:
    names = ("honest_bits", "nll", "delta_nll", "kl", "top1", "bytes_on_disk", "quantize_seconds")
    means = {name: fmean(float(row[name]) for row in same) for name in names}
    windows = math.sqrt(fmean(float(row["delta_error"]) ** 2 for row in same))
    means["delta_error"] = math.hypot(windows, stdev(float(row["delta_nll"]) for row in same))
    means["perplexity"] = math.exp(min(means["nll"], 700.0))
    return {**same[0], **means, "seeds": len(same)}


def cells_of(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    group = {None: "-", 0: "column"}.get(row["group"], str(row["group"]))
    calibration = "-" if row["calibration"] is None else f"{row['calibration'][:6]} #{row['seed']}"
    calibration = f"{row['seeds']} seeds" if "seeds" in row else calibration
    name = row["name"] if row["inject"] is None else f"{row['name']}, outliers planted"
    if row["state"] != "measured":
        bits = "-" if row["bits"] is None else f"{row['bits']}"
        empty = ("-",) * (len(COLUMNS) - 6)
        return (name, bits, "-", group, calibration, row["state"], *empty)
    plain = row["method"] == "none"
    speed = "-"
    if row.get("decode_tokens_per_s") is not None:
        speed = f"{row['decode_tokens_per_s']:.0f} ({row['decode_ratio']:.2f} x)"
    return (
        name,
        f"{float(row['nominal_bits']):.3g}",
        f"{float(row['honest_bits']):.3f}",
        group,
        calibration,
        f"{float(row['nll']):.4f}",
        "-" if plain else f"{float(row['delta_nll']):+.4f} ± {float(row['delta_error']):.4f}",
        perplexity(float(row["perplexity"])),
        "-" if plain else f"{float(row['kl']):.4f}",
        "-" if plain else f"{float(row['top1']):.1%}",
        f"{row['bytes_on_disk'] / 1e6:.2f}",
        "-" if plain else f"{row['quantize_seconds']:.1f} s",
        speed,
    )


def perplexity(value: float) -> str:
    """Two decimals while they say something."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def reasons(rows: Sequence[Row]) -> dict[str, list[str]]:
    """`{why rows were not measured: their labels}`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "measured":
            found.setdefault(f"{row['state']}, {row['error']}", []).append(row["label"])
    return found
