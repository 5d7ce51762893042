"""Speed of generation beside transformers + torch, in one run on this machine.

    python benchmarks/generate.py [--rounds=8] [--steps=63] [--types=float32,bfloat16]
        [--sides=torch,compiled,sheaf] [--tiny] [--markdown]

The model is the 12M-parameter Llama of configs/llama_12m.py with the same random weights on both
sides; prompts of 128 tokens, 64 new ones, greedy. Each row is a process of its own, and the rows
take turns. In each turn a row generates 1 token, which is the prefill, then 64: the difference is
63 steps of decoding (`--steps`). The ratio is the median over the rounds. Without torch its rows
are left out, and the table says so. Measure on an idle machine: torch's threads wait for one
another some hundred times a token, and while other programs hold their cores that costs torch far
more than Sheaf.
"""

from __future__ import annotations

import argparse
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

from benchmarks.generate_worker import PROMPT  # noqa: E402
from benchmarks.train_step import TYPES, finish, has_torch  # noqa: E402
from benchmarks.train_step_worker import TINY  # noqa: E402

ROWS = (1, 8)
"""Sizes of the batch."""
SIDES = {"torch": "transformers", "compiled": "transformers, torch.compile", "sheaf": "Sheaf"}
COLUMNS = ["side", "type", *(f"decode tokens/s, batch {n}" for n in ROWS), "prefill tokens/s"]
Row = tuple[str, str]
Measured = dict[Row, dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit status 1 if the two sides choose different tokens in float32."""
    options = parse(arguments)
    console = Console(stderr=True)
    sides = [s for s in options.sides.split(",") if s == "sheaf" or has_torch()]
    rows = [(side, dtype) for dtype in options.types.split(",") for side in sides]
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            (Path(folder) / TINY).touch()
        if has_torch():
            console.print("preparing the weights …")
            finish(start("prepare", folder))
        measured = measure(rows, folder, options, console)
    show([table_row(row, measured) for row in rows], options.markdown)
    print(footer(measured, options))
    same = agreement(measured, "float32")
    return 0 if same is None or same == 1.0 else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each row")
    parser.add_argument("--steps", type=int, default=63, help="of decoding, in a turn")
    parser.add_argument("--types", default=",".join(TYPES), help="number types, by commas")
    parser.add_argument("--sides", default=",".join(SIDES), help="what to compare, by commas")
    parser.add_argument("--tiny", action="store_true", help="small enough for a test")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: at least 1")
    for name, known in (("types", TYPES), ("sides", SIDES)):
        for value in getattr(options, name).split(","):
            if value not in known:
                given = getattr(options, name)
                parser.error(f"--{name}={given}: {value!r} is not one of {', '.join(known)}")
    return options


def start(job: str, *arguments: str) -> subprocess.Popen[str]:
    """A worker process on the CPU, compiling everything anew, in train.py's huge pages."""
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.generate_worker", job, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(worker: subprocess.Popen[str], rows: int, new: int) -> dict[str, Any]:
    """Let a worker generate; `{seconds, tokens}`."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{rows} {new}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def measure(
    rows: list[Row], folder: str, options: argparse.Namespace, console: Console
) -> Measured:
    """Start a worker a row, warm each up, and let them take turns."""
    workers = {row: start(row[0], folder, row[1]) for row in rows}
    measured: Measured = {row: {"prefill": [], **{n: [] for n in ROWS}} for row in rows}
    for row, worker in workers.items():
        console.print(f"compiling {SIDES[row[0]]}, {row[1]} …")
        for count in ROWS:
            for new in (1, options.steps + 1):
                measured[row][f"tokens {count}"] = ask(worker, count, new)["tokens"]
    for turn in range(options.rounds):
        console.print(f"turn {turn + 1} of {options.rounds}")
        for row, worker in workers.items():
            for count in ROWS:
                prefill = ask(worker, count, 1)["seconds"]
                whole = ask(worker, count, options.steps + 1)["seconds"]
                measured[row][count].append(count * options.steps / (whole - prefill))
                if count == ROWS[-1]:
                    measured[row]["prefill"].append(count * PROMPT / prefill)
    for row, worker in workers.items():
        measured[row]["facts"] = finish(worker)
    return measured


def table_row(row: Row, measured: Measured) -> list[str]:
    """Each figure's median, and the median of its ratio to transformers in the same turn."""
    peer = measured.get(("torch", row[1]))
    cells = [SIDES[row[0]], row[1]]
    for what in (*ROWS, "prefill"):
        figures = measured[row][what]
        text = f"{median(figures):,.0f}"
        if peer is not None and row[0] != "torch":
            ratios = [a / b for a, b in zip(figures, peer[what], strict=True)]
            text += f" ({median(ratios):.2f} x)"
        cells.append(text)
    return cells


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


def agreement(measured: Measured, dtype: str) -> float | None:
    """Share of tokens that both sides choose alike, or None with one side only."""
    ours, theirs = (measured.get((side, dtype)) for side in ("sheaf", "torch"))
    if ours is None or theirs is None:
        return None
    pairs = [
        (a, b)
        for count in ROWS
        for row, other in zip(ours[f"tokens {count}"], theirs[f"tokens {count}"], strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def footer(measured: Measured, options: argparse.Namespace) -> str:
    """What it all ran on, how torch did it, agreement and the roofline."""
    busy = os.getloadavg()[0] - 1
    lines = [
        f"Medians of {options.rounds} turns; {os.cpu_count()} cores; "
        f"Python {platform.python_version()}; other programs' load {max(busy, 0.0):.1f}."
    ]
    if not has_torch():
        lines.append("torch and transformers are not installed: no rows of theirs.")
    for dtype in TYPES:
        same = agreement(measured, dtype)
        if same is not None:
            ways = ", ".join(sorted(set(measured["torch", dtype]["facts"]["ways"].values())))
            lines.append(
                f"{dtype}: {same:.1%} of the greedy tokens are the same on both sides; "
                f"transformers was fastest with {ways}."
            )
        if ("sheaf", dtype) not in measured:
            continue
        facts = measured["sheaf", dtype]["facts"]
        read = facts["weight_bytes"] + facts["cache_bytes"] * (PROMPT + options.steps // 2)
        bound = facts["product"] / read
        reached = median(measured["sheaf", dtype][1]) / bound
        lines.append(
            f"{dtype} roofline at batch 1: a token reads {read / 1e6:.1f} MB; row x matrix runs "
            f"at {facts['product'] / 1e9:.1f} GB/s here (a copy at {facts['copy'] / 1e9:.1f}): "
            f"{bound:,.0f} tokens/s, of which {reached:.0%} is reached."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
