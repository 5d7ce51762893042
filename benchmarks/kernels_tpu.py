"""Every TPU kernel compiled for every generation, beside the library kernel that it would replace.

    python benchmarks/kernels_tpu.py [--kernels=attention,...] [--generations=v5e,...] [--markdown]

Needs libtpu, and no TPU: nothing runs, so nothing here is a measured time. The roofline is the
larger of FLOPs over the peak and bytes over the bandwidth, by the kernel's own `cost.py`; the
compiler's estimate is the roofline of what the kernel told it. VMEM is the scoped allocation that
the compiler reports for the largest kernel of the call, with blocks, double buffers and spills.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without an installation

from benchmarks.kernel_case import Case
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
    "library VMEM",
    "library temp MB",
    "library compiler us",
)


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; exit status 1 if one of our kernels does not compile."""
    options = parse(arguments)
    reason = why_not()
    if reason is not None:
        print(f"nothing to compile with: {reason}", file=sys.stderr)
        return 2
    rows, failures = [], []
    for operation in options.kernels.split(","):
        for generation in options.generations.split(","):
            for row, failure in measured(operation, generation):
                rows.append(row)
                failures += [failure] if failure else []
    show(rows, options.markdown)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(arguments)


def measured(operation: str, generation: str) -> Iterator[tuple[list[str], str | None]]:
    """A row for each case of an operation, with what went wrong."""
    for case in importlib.import_module(KERNELS[operation]).cases(generation):
        mine, problem = attempt(case.function, case.shapes, generation)
        library = None
        if case.library is not None:
            library, _ = attempt(case.library, case.library_shapes or case.shapes, generation)
        row = [
            case.name,
            generation,
            *own_columns(case, generation, mine),
            *library_columns(case, library),
        ]
        yield row, f"{case.name} on {generation}: {problem}" if problem else None


def attempt(
    function: Callable[..., Any], shapes: tuple[Any, ...], generation: str
) -> tuple[Compiled | None, str | None]:
    try:
        return compile_for(function, shapes, generation), None
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"


def own_columns(case: Case, generation: str, compiled: Compiled | None) -> list[str]:
    figures = GENERATIONS[generation]
    peak = (getattr(figures, case.unit) or figures.bfloat16) * figures.cores
    compute = case.flops / peak
    memory = case.bytes / (figures.hbm_bandwidth * figures.cores)
    bound = "products" if compute > memory else "memory"
    roofline = [f"{max(compute, memory) * 1e6:.0f}", bound]
    work = [f"{case.flops / 1e9:.1f}", f"{case.bytes / 1e6:.1f}"]
    if compiled is None:
        return ["does not compile", *work, *roofline, "-", "-"]
    return [vmem(compiled), *work, *roofline, seconds(compiled), f"{compiled.temp_bytes / 1e6:.1f}"]


def library_columns(case: Case, compiled: Compiled | None) -> list[str]:
    if case.library is None:
        return ["none", "-", "-"]
    if compiled is None:
        return ["does not compile", "-", "-"]
    return [vmem(compiled), f"{compiled.temp_bytes / 1e6:.1f}", seconds(compiled)]


def vmem(compiled: Compiled) -> str:
    return f"{max(compiled.vmem_bytes, default=0) / MIB:.1f}"


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
