"""The rows of `benchmarks/quantization.py` as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def show(rows: Sequence[Row], markdown: bool) -> None:
    """Print the table, and under it why rows were not measured."""
    cells = [cells_of(row) for row in rows]
    print_cells(cells, markdown)
    for reason, names in reasons(rows).items():
        print(f"\n{'; '.join(names)}: {reason}")


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
