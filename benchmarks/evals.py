"""Speed of lm-eval with a checkpoint of ours beside its own `hf` model, in one run.

    python benchmarks/evals.py --text=held_out.jsonl.gz [--checkpoint=assets/lab] [--rounds=3]
        [--batches=1,16,64] [--questions=40] [--documents=16] [--answers=16] [--markdown]

Both sides have the same weights (the checkpoint, exported for transformers) in float32 and run the
same three tasks, made from the text, through lm-eval's `evaluate`: questions with four options,
whole documents, and 32 greedy tokens after a prompt. Each row is a process of its own and the rows
take turns. Each turn has examples of its own, so that no side remembers an answer or a prompt. The
first turn, which compiles, stands apart; the last line says if a later one did too. Ratios are to
the fastest size of batch that `hf` has for the task, medians over the turns: of time, and of CPU
time, which other programs disturb less. Measure on an idle machine all the same.

Exit status: 1 if the two sides differ in an answer, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, which has an `evals` too
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from data import open_source  # noqa: E402
from model.families.exporter import export_checkpoint  # noqa: E402

TASKS = ("options", "documents", "generation")
GOAL, TOLERANCE, NEW = 3.0, 1e-3, 32
OURS = "sheaf"
Measured = dict[str, dict[str, list[dict[str, Any]]]]
"""`{row: {task: what came of each turn}}`."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; see the module for the exit status."""
    options = parse(arguments)
    missing = [name for name in ("lm_eval", "torch", "transformers") if not there(name)]
    if missing:
        print(f"evals: {', '.join(missing)}: not installed, so nothing can be compared")
        return 2
    with tempfile.TemporaryDirectory() as work:
        try:
            prepare(Path(work), options)
        except (ValueError, OSError) as error:
            print(f"evals: {error}", file=sys.stderr)
            return 2
        measured = measure(Path(work), options)
    show([cells(row, measured) for row in measured], options.markdown)
    differing = differences(measured)
    late = sum(turn["compiled"] for task in TASKS for turn in measured[OURS][task][1:])
    print(footer(options, differing, late))
    return int(any(count > 0 for count in differing.values()))


def there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--text", required=True, help="text to make the tasks from: a file, a folder, a glob")
    add("--checkpoint", default=str(ROOT / "assets" / "lab"), help="a checkpoint or run folder")
    add("--rounds", type=int, default=3, help="turns after the first")
    add("--batches", default="1,16,64", help="sizes of hf's batches, by commas")
    add("--questions", type=int, default=40, help="with four options each")
    add("--documents", type=int, default=16, help="of 800 words")
    add("--answers", type=int, default=16, help=f"of {NEW} tokens")
    add("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    for name in ("rounds", "questions", "documents", "answers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: at least 1")
    if not all(size.isdigit() and int(size) for size in options.batches.split(",")):
        parser.error(f"--batches={options.batches}: numbers of 1 or more, by commas")
    return options


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The model for both sides, and the tasks."""
    checkpoint = Path(options.checkpoint).absolute()
    export_checkpoint(checkpoint, folder / "hf", dtype="float32")
    (folder / "checkpoint").write_text(str(checkpoint))
    rows = itertools.islice(open_source(options.text).rows(), 400)
    words = [row.text.split() for row in rows if row.text]
    rng = random.Random(0)
    fields: dict[str, dict[str, Any]] = {
        "options": {
            "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "options",
            "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
        },
        "documents": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "generation": {
            "output_type": "generate_until", "doc_to_text": "text", "doc_to_target": "answer",
            "generation_kwargs": {"until": [], "max_gen_toks": NEW, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    tasks = [
        described(folder, f"{name}_{turn}", rows, fields[name])
        for turn in range(options.rounds + 1)
        for name, rows in examples(words, rng, options).items()
    ]
    (folder / "tasks.json").write_text(json.dumps({each["task"]: each for each in tasks}))


def examples(
    words: list[list[str]], rng: random.Random, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each task in one turn."""
    return {
        "options": [question(words, rng) for _ in range(options.questions)],
        "documents": [{"text": passage(words, rng, 800)} for _ in range(options.documents)],
        "generation": [
            {"text": passage(words, rng, 80), "answer": ""} for _ in range(options.answers)
        ],
    }


def question(words: list[list[str]], rng: random.Random) -> dict[str, Any]:
    """A passage, and four ways in which it may go on."""
    texts = [passage(words, rng, rng.randint(40, 160)).split() for _ in range(4)]
    options = [" ".join(each[-8:]) for each in texts]
    answer = rng.randrange(4)
    options[0], options[answer] = options[answer], options[0]
    return {"text": " ".join(texts[0][:-8]), "options": options, "answer": answer}


def passage(words: list[list[str]], rng: random.Random, count: int) -> str:
    """So many words in a row."""
    long = [each for each in words if len(each) >= count]
    if not long:
        raise ValueError(f"--text: none of the first 400 documents has {count} words")
    found = rng.choice(long)
    start = rng.randrange(len(found) - count + 1)
    return " ".join(found[start : start + count])


def described(
    folder: Path, name: str, rows: list[dict[str, Any]], fields: dict[str, Any]
) -> dict[str, Any]:
    """A task of lm-eval over a file."""
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    kept = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    where = {"dataset_path": "json", "dataset_kwargs": kept, "test_split": "test"}
    return {"task": name, "num_fewshot": 0, **where, **fields}


def start(folder: Path, row: str) -> subprocess.Popen[str]:
    """A worker process on the CPU, compiling everything anew, without a network."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.evals_worker", str(folder), row],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ask(worker: subprocess.Popen[str], task: str) -> dict[str, Any]:
    """Let a worker run a task."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{task}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker failed with status {worker.wait()}: {worker.args}")
    return json.loads(line)


def measure(folder: Path, options: argparse.Namespace) -> Measured:
    """Start a worker a row, and let them take turns."""
    console = Console(stderr=True)
    rows = [*(f"hf:{size}" for size in options.batches.split(",")), OURS]
    workers = {row: start(folder, row) for row in rows}
    measured: Measured = {row: {task: [] for task in TASKS} for row in rows}
    try:
        for turn in range(options.rounds + 1):
            console.print(f"turn {turn} of {options.rounds}" if turn else "first turn, compiling …")
            for task, row in itertools.product(TASKS, rows):
                measured[row][task].append(ask(workers[row], f"{task}_{turn}"))
    finally:
        for worker in workers.values():
            worker.communicate()
    return measured


def speeds(measured: Measured, row: str, task: str, time: str = "seconds") -> list[float]:
    """Requests a second of each turn; the first is that with compilation."""
    return [turn["requests"] / turn[time] for turn in measured[row][task]]


def ratio(measured: Measured, task: str, time: str) -> float:
    """How much faster we are than the fastest `hf`: the median over the turns after the first."""
    peers = [speeds(measured, peer, task, time)[1:] for peer in measured if peer != OURS]
    ours, best = speeds(measured, OURS, task, time)[1:], max(peers, key=median)
    return median(a / b for a, b in zip(ours, best, strict=True))


def cells(row: str, measured: Measured) -> list[str]:
    """A row of the table: of each task the median and, of ours, the ratios and the first turn."""
    kind, _, batch = row.partition(":")
    found = ["Sheaf" if kind == OURS else f"lm-eval's hf, batch {batch}"]
    for task in TASKS:
        first, *others = speeds(measured, row, task)
        text = f"{median(others):,.1f}"
        if kind == OURS:
            wall, cpu = (ratio(measured, task, time) for time in ("seconds", "cpu_seconds"))
            text += f" ({wall:.2f} x; CPU time {cpu:.2f} x; with compilation {first:,.1f})"
        found.append(text)
    return found


def differences(measured: Measured) -> dict[str, int]:
    """Of each task, how many answers of ours are not those of hf with the first size of batch, in
    all turns.
    """
    peer, found = next(iter(measured)), {}
    for task in TASKS:
        turns = zip(measured[OURS][task], measured[peer][task], strict=True)
        sides = [(ours["answers"], theirs["answers"]) for ours, theirs in turns]
        found[task] = sum(not same(*pair) for side in sides for pair in zip(*side, strict=True))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two answers are: texts, log-probabilities, or these with being greedy."""
    if isinstance(one, list):
        return same(one[0], other[0]) and one[1] == other[1]
    if isinstance(one, float):
        return abs(one - other) <= TOLERANCE
    return one == other


def show(lines: list[list[str]], markdown: bool) -> None:
    """Print the table."""
    columns = ["requests/s", *TASKS]
    if markdown:
        for line in (columns, ["---"] * len(columns), *lines):
            print("| " + " | ".join(line) + " |")
        return
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def footer(options: argparse.Namespace, differing: dict[str, int], late: int) -> str:
    """What it ran on, whether the answers agree, and programs compiled after the first turn."""
    busy = max(os.getloadavg()[0] - 1, 0.0)
    told = ", ".join(f"{task} {count}" for task, count in differing.items())
    return (
        f"Medians of {options.rounds} turns; {os.cpu_count()} cores; Python "
        f"{platform.python_version()}; load at the end {busy:.1f}; programs compiled after the "
        f"first turn: {late}. Answers that differ: {told}. Goal: {GOAL:g} x."
    )


if __name__ == "__main__":
    sys.exit(main())
