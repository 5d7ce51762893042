"""Speed and memory of a training step beside transformers + torch, in one run on this machine.

    python benchmarks/train_step.py [--steps=20] [--types=float32,bfloat16] [--tiny] [--markdown]

The model is the 12M-parameter Llama of configs/llama_12m.py, on tokens of Python's own library.
Each row is a process of its own, so its peak memory is its own. The rows take turns, a few steps
at a time, so that whatever else the machine does falls on all of them; the ratio is the median over
the rounds. Without torch its rows are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step_worker import TINY  # noqa: E402

TOKENS = 8 * 256
"""Tokens of a step."""
STEPS_A_ROUND = 2
SIDES = {"torch": "transformers", "sheaf": "Sheaf"}
TYPES = ("float32", "bfloat16")
COLUMNS = [
    "side",
    "type",
    "tokens/s",
    "x torch",
    "CPU s/step",
    "peak memory",
    "first step",
    "data wait",
]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit status 1 if the two sides do not compute the same."""
    options = parse(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            (Path(folder) / TINY).touch()
        console.print("preparing the text …")
        finish(start("prepare", folder))
        with_torch = has_torch()
        rows = [
            (side, dtype)
            for dtype in options.types.split(",")
            for side in SIDES
            if with_torch or side != "torch"
        ]
        checked = None
        if with_torch:
            console.print("comparing the losses of the two sides …")
            checked = finish(start("check", folder))
        measured = measure(rows, folder, options.steps, console)
    show([table_row(row, measured) for row in rows], options.markdown)
    print(footer(checked, options.steps))
    return 0 if checked is None or checked["first"] < 1e-4 else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row")
    parser.add_argument("--types", default=",".join(TYPES), help="number types, by commas")
    parser.add_argument("--tiny", action="store_true", help="small enough for a test")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps={options.steps}: at least 1")
    for dtype in options.types.split(","):
        if dtype not in TYPES:
            parser.error(f"--types={options.types}: {dtype!r} is not one of {', '.join(TYPES)}")
    return options


def has_torch() -> bool:
    """Whether both torch and transformers can be imported."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def start(job: str, *arguments: str) -> subprocess.Popen[str]:
    """A worker process on the CPU, compiling everything anew; both sides get train.py's pages."""
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.train_step_worker", job, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(worker: subprocess.Popen[str], steps: int) -> dict[str, float]:
    """Let a worker take steps; `{seconds, cpu_seconds, loss}`."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def finish(worker: subprocess.Popen[str]) -> dict[str, float]:
    """End a worker; the last line that it says, or nothing. Raises if it failed."""
    output, _ = worker.communicate()
    if worker.returncode:
        raise SystemExit(f"a worker failed with status {worker.returncode}: {worker.args}")
    lines = output.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def measure(
    rows: list[tuple[str, str]], folder: str, steps: int, console: Console
) -> dict[tuple[str, str], dict[str, Any]]:
    """By row: seconds and CPU seconds a step, by round; the first step; the worker's own facts."""
    workers, measured = {}, {}
    for row in rows:
        console.print(f"first step of {' '.join(row)} …")
        workers[row] = start(row[0], folder, row[1])
        first = ask(workers[row], 1)["seconds"]
        measured[row] = {"first": first, "rounds": [], "cpu": []}
    for row in rows:
        ask(workers[row], STEPS_A_ROUND)
    for number in range(-(-steps // STEPS_A_ROUND)):
        console.print(f"round {number + 1} of {-(-steps // STEPS_A_ROUND)}", end="\r")
        for row in rows:
            took = ask(workers[row], STEPS_A_ROUND)
            measured[row]["rounds"].append(took["seconds"] / STEPS_A_ROUND)
            measured[row]["cpu"].append(took["cpu_seconds"] / STEPS_A_ROUND)
    for row in rows:
        measured[row] |= finish(workers[row])
    return measured


def table_row(row: tuple[str, str], measured: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """One line of the table."""
    own, torch = measured[row], measured.get(("torch", row[1]))
    ratio = "–"
    if torch is not None:
        pairs = zip(torch["rounds"], own["rounds"], strict=True)
        ratio = f"{median(theirs / ours for theirs, ours in pairs):.2f}"
    step = median(own["rounds"])
    waits = "–"
    if "waited" in own:
        waits = f"{own['waited'] / (step * (STEPS_A_ROUND * (len(own['rounds']) + 1) + 1)):.2%}"
    return [
        SIDES[row[0]],
        row[1],
        f"{TOKENS / step:,.0f}",
        ratio,
        f"{median(own['cpu']):.2f}",
        f"{own['peak_bytes'] / 2**20:,.0f} MiB",
        f"{own['first']:.1f} s",
        waits,
    ]


def show(lines: list[list[str]], markdown: bool) -> None:
    """Print the table."""
    if markdown:
        for cells in (COLUMNS, ["---"] * len(COLUMNS), *lines):
            print("| " + " | ".join(cells) + " |")
        return
    table = Table(*COLUMNS)
    for cells in lines:
        table.add_row(*cells)
    Console().print(table)


def footer(checked: dict[str, float] | None, steps: int) -> str:
    """What was measured, where, and whether the sides agree."""
    where = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    text = (
        f"\n{steps} timed steps of {TOKENS} tokens on {where}, rows taking turns; tokens/s is the "
        "median round.\nOn a busy machine compare the CPU seconds, which the others touch least."
        "\nFirst step: making model, optimizer and first step, compilation included, "
        "imports not."
    )
    if checked is None:
        return text + "\ntorch and transformers are not installed: no rows of theirs."
    return (
        f"{text}\nSame weights, same batch: loss {checked['loss']:.5f}, difference "
        f"{checked['first']:.1e}; largest difference over 5 AdamW steps {checked['all']:.1e}."
    )


if __name__ == "__main__":
    sys.exit(main())
