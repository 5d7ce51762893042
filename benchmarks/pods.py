"""What large models would take on TPU pods: the real training step of each, compiled ahead.

    python benchmarks/pods.py --rows=FILE.jsonl [--only=TEXT] [--limit=N] [--table]

Each row is compiled in a process of its own, one after another, and added to FILE as soon as it is
there; rows that FILE has are not compiled again unless they failed, so a run goes on where it was
stopped. Needs libtpu and no TPU. At the end, or with --table at once, FILE is printed as a table.
MFU counts causal attention at half: of the step in which nothing overlaps and of that in which all
does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
MAXTEXT = "MaxText"
"""docs/reference/models/tiering.md of its repository."""


@dataclass(frozen=True)
class Pod:
    """One row: a config, where it runs, what changes it, and what was published of its class."""

    config: str
    topology: str
    flags: str
    published: str

    @property
    def key(self) -> str:
        """By which a row is found again."""
        return f"{self.config} {self.topology} {self.flags}"

    def command(self, figures: Path) -> list[str]:
        """That compiles it."""
        flags = [f"--config.{flag}" for flag in self.flags.split()]
        return [
            *(sys.executable, "-m", "planning", "compile", f"--config=configs/{self.config}.py"),
            *(f"--topology={self.topology}", f"--json={figures}", *flags),
        ]


V5P_70B, V6E_70B = f"{MAXTEXT} 65.4 % (Llama 2 70B, v5p)", f"{MAXTEXT} 43.8 % (Llama 2 70B, v6e)"
GPT_175B = "MegaScale 55.2 % (A100), Frontier 36.1 % (MI250X)"
GPT_1T = "Frontier 32.0 % (MI250X)"
SMALL = f"{MAXTEXT} 45.5 % (Llama 3.1 8B, v6e)"
MIXTURE = f"16 % by its H100 hours; {MAXTEXT} 52.6 % (Mixtral 8x7B, v5p)"

PODS = (
    Pod("minicpm_2b", "v5e:4x4", "mesh.data=1 mesh.fsdp=16 data.batch_size=64", SMALL),
    Pod("minicpm_2b", "v6e:4x4", "mesh.data=1 mesh.fsdp=16 data.batch_size=128", SMALL),
    Pod("k2_65b", "v5p:8x8x16", "mesh.data=16 mesh.fsdp=64 data.batch_size=2048", V5P_70B),
    Pod(
        "k2_65b",
        "v5e:16x16",
        "mesh.data=1 mesh.fsdp=64 mesh.tensor=4 data.batch_size=2048 train.accumulation=16",
        V6E_70B,
    ),
    Pod("llama2_70b", "v5p:8x8x8", "mesh.data=8 mesh.fsdp=64", V5P_70B),
    Pod(
        "llama2_70b",
        "v6e:16x16",
        "mesh.data=2 mesh.fsdp=64 mesh.tensor=2 train.accumulation=8",
        V6E_70B,
    ),
    Pod("gpt3_175b", "v5p:8x8x8", "mesh.data=8 mesh.fsdp=64", GPT_175B),
    Pod(
        "gpt3_175b",
        "2*v6e:16x16",
        "mesh.data=2 mesh.fsdp=64 mesh.tensor=4 train.accumulation=6",
        GPT_175B,
    ),
    Pod(
        "gpt_1t",
        "v5p:8x16x16",
        "mesh.data=2 mesh.fsdp=128 mesh.tensor=8 data.batch_size=2048 train.accumulation=4",
        GPT_1T,
    ),
    Pod(
        "gpt_1t",
        "v5p:16x16x16",
        "mesh.data=4 mesh.fsdp=128 mesh.tensor=8 data.batch_size=3072 train.accumulation=3",
        GPT_1T,
    ),
    Pod("jetmoe_8b", "v5p:4x4x4", "mesh.data=4 mesh.fsdp=16 data.batch_size=1024", MIXTURE),
    Pod("jetmoe_8b", "v5e:8x8", "mesh.data=4 mesh.fsdp=16 data.batch_size=256", MIXTURE),
)
"""Rows, those that compile fast first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL, read and added to")
    parser.add_argument("--only", default="", help="rows whose config and topology hold this")
    parser.add_argument("--limit", type=int, default=len(PODS), help="rows to compile at most")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    known = parser.parse_args(arguments)
    done = {key for key, row in read(known.rows).items() if "error" not in row}
    missing = [pod for pod in PODS if pod.key not in done and known.only in pod.key]
    for pod in missing[: 0 if known.table else known.limit]:
        row = compiled(pod)
        add(known.rows, {"key": pod.key, **row})
        print(f"{pod.key}: {row.get('error') or 'compiled'}", file=sys.stderr, flush=True)
    print(table(read(known.rows)))
    return 0


def read(path: Path) -> dict[str, Any]:
    """Rows of a file by their key; none if it is not there. A line cut short is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["key"]] = row
    return rows


def add(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, on a line of its own even behind one that was cut short."""
    before = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write("\n" * bool(before and not before.endswith("\n")) + json.dumps(row) + "\n")


def compiled(pod: Pod) -> dict[str, Any]:
    """The figures of a row, or `{"error": what the command said}`."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        done = subprocess.run(pod.command(figures), capture_output=True, text=True, check=False)
        if figures.exists():
            return json.loads(figures.read_text())
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"error": said[-1]}


def table(rows: dict[str, Any]) -> str:
    """Markdown of the rows that there are, in the order of `PODS`."""
    head = (
        "model", "topology", "mesh and flags", "GiB a device (limit)",
        "MFU, none to all overlapped", "limited by", "published", "compiled in",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(_cells(pod, rows[pod.key]))} |" for pod in PODS if pod.key in rows]
    return "\n".join(lines)


def _cells(pod: Pod, row: dict[str, Any]) -> Iterable[str]:
    yield from (pod.config, pod.topology, f"`{pod.flags}`")
    if "error" in row:
        yield from ("", "", row["error"], pod.published, "")
        return
    yield f"{row['memory'] / GIB:.1f} ({row['limit'] / GIB:.1f})"
    yield f"{row['mfu_serial']:.1%} to {row['mfu_overlapped']:.1%}"
    yield from (row["limited_by"], pod.published, f"{row['compile_seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
