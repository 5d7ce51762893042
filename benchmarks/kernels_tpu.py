"""Every TPU kernel compiled for every generation, beside the library kernel that it would replace
and beside XLA's own way.

    python benchmarks/kernels_tpu.py [--kernels=attention,...] [--generations=v5e,...]
        [--schedule] [--markdown]

Needs libtpu, and no TPU: nothing runs, so nothing here is a measured time.

The first table has four figures for each program and generation: VMEM in MiB, the scoped allocation
that the compiler reports for the largest kernel of the call, with blocks, double buffers and
spills; temporaries in memory, in MB; the roofline in us, by the kernel's own `cost.py`, with an m
where the memory bounds it and a p where the products do; and the compiler's estimate in us, which
for a kernel is the roofline of what the kernel told it ("untold": nothing). The second table is why
a quantized kernel is kept: bytes accessed in MB, by the compiler's count, temporaries in memory in
MB, and the compiler's estimate in us, of the kernel and of XLA's program. `--schedule` adds the
longest stretch of instructions without a branch (`tpu_schedule`): its bundles, a cycle each at
best, and how far it fills the matrix units.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without an installation

from benchmarks.kernel_case import Case
from benchmarks.tpu_schedule import Stretch, ask_for_schedules, take_hottest
from kernels_pallas.tpu_topology import (
    GENERATIONS,
    MIB,
    Compiled,
    compile_for,
    why_not,
)

KERNELS: dict[str, str] = {
    "attention": "benchmarks.kernel_cases.attention",
    "decode": "benchmarks.kernel_cases.decode",
    "quantized": "benchmarks.kernel_cases.quantized",
    "dense": "benchmarks.kernel_cases.dense",
}
"""Group of operations -> module with `cases() -> list[Case]`."""


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; exit status 1 if one of our kernels does not compile."""
    options = parse(arguments)
    reason = why_not()
    if reason is not None:
        print(f"nothing to compile with: {reason}", file=sys.stderr)
        return 2
    generations = options.generations.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if options.schedule:
            ask_for_schedules(folder)
        rows = [
            row
            for group in options.kernels.split(",")
            for case in importlib.import_module(KERNELS[group]).cases()
            for row in compiled_rows(case, generations, folder if options.schedule else None)
        ]
    for title, kinds, figures in (
        ("kernels and the library's", ("kernel", "library"), resources),
        ("quantized kernels and XLA's way", ("kernel", "xla"), traffic),
    ):
        shown = [row for row in rows if row.kind in kinds and (row.case.xla or "xla" not in kinds)]
        if shown:
            show(title, shown, generations, figures, options.markdown)
    print(f"\nJAX {jax.__version__}, libtpu {libtpu_version()}; nothing ran")
    return 1 if report(rows) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--schedule", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    for flag, known in (("kernels", KERNELS), ("generations", GENERATIONS)):
        unknown = set(getattr(options, flag).split(",")) - known.keys()
        if unknown:
            parser.error(f"--{flag}: {sorted(unknown)} is not known; there are {', '.join(known)}")
    return options


def libtpu_version() -> str:
    from importlib.metadata import version

    return version("libtpu")


@dataclass(frozen=True)
class Attempt:
    """A compiled program and its hottest stretch, or what went wrong."""

    compiled: Compiled | None
    hottest: Stretch | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    """A program of a case on each generation; kind: "kernel", "library" or "xla"."""

    case: Case
    kind: str
    name: str
    attempts: dict[str, Attempt]


def compiled_rows(case: Case, generations: list[str], folder: str | None) -> Iterator[Row]:
    """The kernel, the library's and XLA's own way; folder: of the schedules."""
    programs = [("kernel", case.name, case.function, case.shapes)]
    for kind, rival in (("library", case.library), ("xla", case.xla)):
        if rival is not None:
            programs.append((kind, rival.name, rival.function, rival.shapes or case.shapes))
    for kind, name, function, shapes in programs:
        print(f"compiling {case.name}: {name}", file=sys.stderr)
        yield Row(case, kind, name, {g: attempt(function, shapes, g, folder) for g in generations})


def attempt(
    function: Callable[..., Any], shapes: tuple[Any, ...], generation: str, folder: str | None
) -> Attempt:
    try:
        compiled = compile_for(function, shapes, generation)
    except Exception as error:  # whatever a compiler raises
        return Attempt(None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
    return Attempt(compiled, take_hottest(folder) if folder else None)


def resources(row: Row, generation: str, compiled: Compiled) -> list[str]:
    """VMEM, temporaries, roofline and the compiler's estimate."""
    used = max(compiled.vmem_bytes, default=0)
    vmem = f"{used / MIB:.1f}" if used else "not told" if compiled.vmem_bytes else "none"
    bound = roofline(row.case, generation) if row.kind == "kernel" else "-"
    told = row.kind == "kernel" or compiled.flops > row.case.flops / 2
    estimate = microseconds(compiled) if told else "untold"
    return [vmem, megabytes(compiled.temp_bytes), bound, estimate]


def traffic(row: Row, generation: str, compiled: Compiled) -> list[str]:
    """Bytes accessed, temporaries and the compiler's estimate."""
    moved, temporary = compiled.bytes_accessed, compiled.temp_bytes
    return [megabytes(moved), megabytes(temporary), microseconds(compiled)]


def roofline(case: Case, generation: str) -> str:
    """Microseconds, and what bounds them."""
    figures = GENERATIONS[generation]
    peak = (getattr(figures, case.unit) or figures.bfloat16) * figures.cores
    products = case.flops / peak
    memory = case.bytes / (figures.hbm_bandwidth * figures.cores)
    return f"{max(products, memory) * 1e6:.0f}{'p' if products > memory else 'm'}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def microseconds(compiled: Compiled) -> str:
    return "-" if not compiled.seconds else f"{compiled.seconds * 1e6:.0f}"


def show(
    title: str,
    rows: list[Row],
    generations: list[str],
    figures: Callable[[Row, str, Compiled], list[str]],
    markdown: bool,
) -> None:
    """A table with a row a program and a column a generation."""
    columns = ["program", "GFLOP", "MB", *generations]
    lines = []
    for row in rows:
        mine = row.kind == "kernel"
        work = [f"{row.case.flops / 1e9:.1f}", megabytes(row.case.bytes)] if mine else ["", ""]
        cells = [cell(row, generation, figures) for generation in generations]
        lines.append([row.name if mine else f"- {row.name}", *work, *cells])
    if markdown:
        for line in (columns, ["---"] * len(columns), *lines):
            print("| " + " | ".join(line) + " |")
        print()
        return
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=200).print(table)


def cell(row: Row, generation: str, figures: Callable[[Row, str, Compiled], list[str]]) -> str:
    made = row.attempts[generation]
    if made.compiled is None:
        return "does not compile"
    parts = figures(row, generation, made.compiled)
    if made.hottest is not None:
        parts.append(f"{made.hottest.bundles} at {made.hottest.matrix_units:.0%}")
    return " · ".join(parts)


def report(rows: list[Row]) -> bool:
    """Say what did not compile, and whether any of it is ours."""
    failed = [
        (row, generation, made.problem)
        for row in rows
        for generation, made in row.attempts.items()
        if made.problem is not None
    ]
    for row, generation, problem in failed:
        print(f"{row.case.name}: {row.name} on {generation}: {problem}", file=sys.stderr)
    return any(row.kind == "kernel" for row, _, _ in failed)


if __name__ == "__main__":
    raise SystemExit(main())
