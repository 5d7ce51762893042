"""Every TPU kernel compiled for every generation, beside the library kernel that it would replace.

    python benchmarks/kernels_tpu.py [--kernels=attention,...] [--generations=v5e,...]
        [--schedule] [--markdown]

Needs libtpu, and no TPU: nothing runs, so nothing here is a measured time. The roofline is the
larger of FLOPs over the peak and bytes over the bandwidth, by the kernel's own `cost.py`; the
compiler's estimate is the roofline of what the kernel told it. VMEM is the scoped allocation that
the compiler reports for the largest kernel of the call, with blocks, double buffers and spills.
`--schedule` adds the longest stretch of instructions without a branch (`tpu_schedule`): its
bundles, a cycle each at best, and how far it fills the matrix units.
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
}
"""Operation -> module with `cases(generation) -> list[Case]`."""
COLUMNS = (
    "kernel",
    "TPU",
    "VMEM MiB",
    "GFLOP",
    "HBM MB",
    "roofline us",
    "bound by",
    "compiler us",
    "temp MB",
    "hot loop",
    "library VMEM",
    "library temp MB",
    "library compiler us",
    "library hot loop",
)


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; exit status 1 if one of our kernels does not compile."""
    options = parse(arguments)
    reason = why_not()
    if reason is not None:
        print(f"nothing to compile with: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if options.schedule:
            ask_for_schedules(folder)
        found = [
            row
            for operation in options.kernels.split(",")
            for generation in options.generations.split(",")
            for row in measured(operation, generation, folder if options.schedule else None)
        ]
    show([row for row, _ in found], options.markdown)
    failures = [failure for _, failure in found if failure]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--schedule", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Attempt:
    """A compiled program and its hottest stretch, or what went wrong."""

    compiled: Compiled | None
    hottest: Stretch | None = None
    problem: str | None = None


def measured(
    operation: str, generation: str, folder: str | None
) -> Iterator[tuple[list[str], str | None]]:
    """A row for each case of an operation, with what went wrong; folder: of the schedules."""
    for case in importlib.import_module(KERNELS[operation]).cases(generation):
        mine = attempt(case.function, case.shapes, generation, folder)
        library = None
        if case.library is not None:
            shapes = case.library_shapes or case.shapes
            library = attempt(case.library, shapes, generation, folder)
        row = [
            case.name,
            generation,
            *own_columns(case, generation, mine),
            *library_columns(library),
        ]
        yield row, f"{case.name} on {generation}: {mine.problem}" if mine.problem else None


def attempt(
    function: Callable[..., Any], shapes: tuple[Any, ...], generation: str, folder: str | None
) -> Attempt:
    try:
        compiled = compile_for(function, shapes, generation)
    except Exception as error:
        return Attempt(None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
    return Attempt(compiled, take_hottest(folder) if folder else None)


def own_columns(case: Case, generation: str, mine: Attempt) -> list[str]:
    figures = GENERATIONS[generation]
    peak = (getattr(figures, case.unit) or figures.bfloat16) * figures.cores
    compute = case.flops / peak
    memory = case.bytes / (figures.hbm_bandwidth * figures.cores)
    bound = "products" if compute > memory else "memory"
    roofline = [f"{max(compute, memory) * 1e6:.0f}", bound]
    work = [f"{case.flops / 1e9:.1f}", f"{case.bytes / 1e6:.1f}"]
    compiled = mine.compiled
    if compiled is None:
        return ["does not compile", *work, *roofline, "-", "-", "-"]
    temp = f"{compiled.temp_bytes / 1e6:.1f}"
    return [vmem(compiled), *work, *roofline, seconds(compiled), temp, loop(mine.hottest)]


def library_columns(library: Attempt | None) -> list[str]:
    if library is None:
        return ["none", "-", "-", "-"]
    compiled = library.compiled
    if compiled is None:
        return ["does not compile", "-", "-", "-"]
    temp = f"{compiled.temp_bytes / 1e6:.1f}"
    return [vmem(compiled), temp, seconds(compiled), loop(library.hottest)]


def loop(hottest: Stretch | None) -> str:
    if hottest is None:
        return "-"
    return f"{hottest.bundles} at {hottest.matrix_units:.0%}"


def vmem(compiled: Compiled) -> str:
    used = max(compiled.vmem_bytes, default=0)
    return f"{used / MIB:.1f}" if used else "not told"


def seconds(compiled: Compiled) -> str:
    return "-" if not compiled.seconds else f"{compiled.seconds * 1e6:.0f}"


def show(rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + " --- |" * len(COLUMNS))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
