"""Every GPU kernel checked and timed on an H100 or H200, in one call under ten minutes.

    python benchmarks/kernels_gpu.py [--kernels=attention,...] [--match=REGEX] [--out=FILE]
        [--budget-seconds=540] [--tune-seconds=0] [--dry-run] [--markdown]

Each kernel is compared with its plain function in float32 on poisoned arguments; then it is timed,
as a share of what the device reaches in this run (matrix products of cuBLAS, a copy), beside other
libraries that are installed. A process of its own has the GPU: what hangs or breaks it costs one
row, and rows are kept in the file as they come. `--dry-run` needs no GPU: it runs every plain
function at a tiny size and compiles every kernel at its own, as far as JAX's CUDA plugin is there.

Exit status: 1 if a check failed, 3 if the time ran out before all were done, 2 for wrong input or
where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without an installation

from benchmarks.kernels_gpu_worker import BROKEN, NO_GPU, Order, Row
from kernels_pallas.gpu_topology import GPUS

ROOT = Path(__file__).parents[1]
KERNELS: dict[str, str] = {
    "attention": "benchmarks.kernel_cases.gpu_attention",
    "decode": "benchmarks.kernel_cases.gpu_decode",
    "products": "benchmarks.kernel_cases.gpu_products",
    "paged": "benchmarks.kernel_cases.gpu_paged",
}
"""Operations -> module with `cases(tiny) -> list[GpuCase]`."""
PATIENCE = 75.0
"""Seconds without a row after which the process is taken to hang; a dry run has no device to."""
GRACE = 20.0
"""Seconds beyond the budget for what is under way."""
COLUMNS = (
    "call",
    "check",
    "error / allowed",
    "us",
    "TFLOP/s",
    "GB/s",
    "of ceiling",
    "goal",
    "speed beside others",
)


def main(arguments: list[str] | None = None) -> int:
    """Run and print; see the module for the exit status."""
    options = parse(arguments)
    try:
        names = chosen(options)
    except ValueError as error:
        print(f"kernels_gpu: {error}", file=sys.stderr)
        return 2
    ends = time.monotonic() + options.budget_seconds
    if options.tune_seconds and not options.dry_run:
        tune(options.tune_seconds)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "rows.jsonl"
        path.write_bytes(b"")
        try:
            for row in measured(names, options, path, ends):
                rows[row.name] = row
                print(f"{row.took:5.0f} s  {row.name}: {row.state} {row.error}", file=sys.stderr)
        except NoGpu as error:
            print(f"kernels_gpu: {error}; --dry-run needs none", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: what follows is what was done", file=sys.stderr)
    for name in names:
        rows.setdefault(name, Row(name, "out of time"))
    show(rows, options.markdown)
    states = {row.state for row in rows.values()}
    return 1 if states & {"wrong", "failed"} else 3 if "out of time" in states else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument(
        "--match", default="", metavar="REGEX", help="only calls whose name it finds"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=540.0, metavar="S", help="of it all"
    )
    parser.add_argument(
        "--tune-seconds", type=float, default=0.0, metavar="S", help="of them, first"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="a line of JSON a row, as it comes"
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: build and compile")
    parser.add_argument("--device", default="h100", choices=tuple(GPUS), help="of --dry-run")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(arguments)


def cases_by_name(tiny: bool = False, kernels: str | None = None) -> dict[str, Any]:
    """Name -> `GpuCase`; kernels: names in `KERNELS`, all by default."""
    found = (
        case
        for kernel in (kernels or ",".join(KERNELS)).split(",")
        for case in importlib.import_module(KERNELS[kernel]).cases(tiny)
    )
    return {case.name: case for case in found}


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of what to run: the ceilings, calls that have a goal, then the others.

    Raises `ValueError` if there is no such kernel or call.
    """
    for kernel in options.kernels.split(","):
        if kernel not in KERNELS:
            raise ValueError(f"--kernels: {kernel!r} is not one of {', '.join(KERNELS)}")
    try:
        pattern = re.compile(options.match)
    except re.error as error:
        raise ValueError(f"--match={options.match}: {error}") from None
    cases = [
        case
        for case in cases_by_name(kernels=options.kernels).values()
        if pattern.search(case.name)
    ]
    if not cases:
        raise ValueError(f"--match={options.match} finds no call of {options.kernels}")
    cases.sort(key=lambda case: not has_goal(case))  # stable
    return [*([] if options.dry_run else ["ceilings"]), *(case.name for case in cases)]


def has_goal(case: Any) -> bool:
    return case.speed is not None and (case.speed.goal, case.speed.beside) != (None, None)


def tune(limit: float) -> None:
    """Let the tuner measure what it can on a GPU; the kernels find its choices by themselves."""
    from kernels_pallas.tuning.kernels import KERNELS as TUNABLE

    names = [name for name, kernel in TUNABLE.items() if kernel.platform == "gpu"]
    if not names:
        print("no kernel has sizes to tune on a GPU", file=sys.stderr)
        return
    command = [sys.executable, "-m", "kernels_pallas", "tune", f"--kernels={','.join(names)}"]
    try:
        subprocess.run([*command, f"--budget-seconds={limit}"], cwd=ROOT, timeout=limit + GRACE)
    except subprocess.TimeoutExpired:
        print("tuning hangs: it goes on without", file=sys.stderr)


class NoGpu(Exception):
    """The process has found none."""


def measured(
    names: list[str], options: argparse.Namespace, path: Path, ends: float
) -> Iterator[Row]:
    """Rows as they come, of as many processes as it takes."""
    left, ceilings = list(names), {}
    with path.open("rb") as file:
        while left and time.monotonic() < ends:
            order = Order(
                left, str(path), ends - time.monotonic(), options.dry_run, options.device, ceilings
            )
            for row in rows_of_a_process(order, file, ends):
                left = [name for name in left if name != row.name]
                ceilings = row.facts.get("ceilings", ceilings)
                yield row


def rows_of_a_process(order: Order, file: IO[bytes], ends: float) -> Iterator[Row]:
    """What it writes, and the row of the case at which it fell, if it did."""
    left, fault, begun = list(order.names), "", None
    patience = order.seconds if order.dry_run else PATIENCE
    with tempfile.TemporaryFile() as said:
        process = start(order, said)
        for row in watched(process, file, patience, ends + GRACE):
            if isinstance(row, str):
                fault = row
            elif row.done:
                left, begun = [name for name in left if name != row.name], None
                yield row
            else:
                begun = row
        reason = fault or last_line(said)
    if process.returncode == NO_GPU:
        raise NoGpu(reason)
    over = time.monotonic() > ends and begun is None
    if left and not over and process.returncode != BROKEN:
        yield fallen(left[0], begun, reason)


def fallen(name: str, begun: Row | None, reason: str) -> Row:
    """The row of a case that took its process with it, or that a rival did that to; begun: what was
    known of it before its rivals were done.
    """
    if begun is not None:
        return replace(begun, done=True, rivals={**begun.rivals, "the next": f"ended by: {reason}"})
    return Row(name, "failed", f"the process ended here: {reason}")


def last_line(said: IO[bytes]) -> str:
    """Of what a process said."""
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def start(order: Order, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """A worker process, told what to do."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *python_path()])}
    if order.dry_run:
        environment["JAX_PLATFORMS"] = "cpu"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kernels_gpu_worker"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=said,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(order)).encode())
    process.stdin.close()
    return process


def python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def watched(
    process: subprocess.Popen[bytes], file: IO[bytes], patience: float, ends: float
) -> Iterator[Row | str]:
    """Rows that a process writes until it ends; killed where it says nothing for too long, which is
    said in a word.
    """
    heard, line = time.monotonic(), b""
    try:
        while True:
            over = process.poll() is not None
            line += file.readline()
            if line.endswith(b"\n"):
                heard = time.monotonic()
                yield Row(**json.loads(line))
                line = b""
            elif over:
                return
            elif time.monotonic() > min(heard + patience, ends):
                yield f"nothing for {time.monotonic() - heard:.0f} s"
                return
            else:
                time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def show(rows: dict[str, Row], markdown: bool) -> None:
    """The table, and the ceilings over it."""
    found = rows.pop("ceilings", None)
    if found is not None:
        print(ceilings_in_words(found))
    cells = [cells_of(row) for row in rows.values()]
    if markdown:
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + " --- |" * len(COLUMNS))
        for row in cells:
            print("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |")
        return
    table = Table(*COLUMNS)
    for row in cells:
        table.add_row(*row)
    Console(width=200, markup=False).print(table)


def ceilings_in_words(row: Row) -> str:
    """With what the vendor says of the device."""
    from kernels_pallas.gpu_topology import gpu_of

    if row.state != "measured":
        return f"ceilings: {row.state} {row.error}"
    found, name = row.facts["ceilings"], gpu_of(row.facts["device"])
    vendor = GPUS[name] if name else None
    parts = []
    for kind, unit, field in (
        ("bfloat16", "TFLOP/s", "bfloat16"),
        ("int8", "TOP/s", "int8"),
        ("copy", "TB/s", "bandwidth"),
    ):
        said = f" of {getattr(vendor, field) / 1e12:.4g}" if vendor else ""
        parts.append(f"{kind} {found[kind] / 1e12:.4g}{said} {unit}")
    facts = f"{row.facts['device']}, JAX {row.facts['jax']}, {row.facts['cuda']}"
    return f"{facts}\nceilings: {', '.join(parts)}"


def cells_of(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    state = " ".join(part for part in (row.state, row.error) if part)
    state += f"; {row.compiled}" if row.compiled else ""
    goal = row.goal + {True: " met", False: " not met", None: ""}[row.met]
    if row.seconds is None:
        return (row.name, state, error_of(row), "-", "-", "-", "-", goal or "-", "-")
    return (
        row.name,
        state,
        error_of(row),
        f"{row.seconds * 1e6:.1f}",
        f"{row.flops / row.seconds / 1e12:.1f}",
        f"{row.bytes / row.seconds / 1e9:.0f}",
        "-" if row.share is None else f"{row.share:.0%} of {row.ceiling}",
        goal or "-",
        ", ".join(beside(name, other, row.seconds) for name, other in row.rivals.items()) or "-",
    )


def error_of(row: Row) -> str:
    """Of the result that is nearest to its limit, or furthest beyond."""
    pairs = list(zip(row.apart, row.tolerance, strict=True))
    if not pairs:
        return "-"
    found, allowed = max(pairs, key=lambda pair: ratio(*pair))
    return f"{'not finite' if found is None else f'{found:.1e}'} / {allowed:.1e}"


def ratio(found: float | None, allowed: float) -> float:
    if found is None:
        return float("inf")
    return found / allowed if allowed else found * 1e30


def beside(name: str, other: Any, seconds: float) -> str:
    """How many times as fast as another, or why that is not known."""
    return f"{name}: {other / seconds:.2f} x" if isinstance(other, float) else f"{name}: {other}"


if __name__ == "__main__":
    raise SystemExit(main())
