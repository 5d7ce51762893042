"""Throughput of servers with OpenAI's API, in one run on this machine's CPU.

    python benchmarks/serving.py [--clients=1,8,32] [--transformers-python=PYTHON]
        [--llama-python=PYTHON] [--rounds=3] [--markdown] [--plot=serving.svg] [--out=serving.json]

`serve.py`, `transformers serve` and llama-cpp-python's server on the 12M-parameter Llama of
configs/llama_12m.py in float32, each a real process, and `python -m serving bench`'s client beside
it: prompts of 128 tokens, 64 new ones, greedy, streamed. The servers take turns at each number of
clients. A peer runs in the interpreter that is named, which may be of another environment; without
one it is left out, and the table says so. Then come figures of the engine alone. Measure on an idle
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import serving_servers as servers  # noqa: E402
from benchmarks.serving_files import Files, prepare, prompts  # noqa: E402
from serving.load import Load, LoadSettings, Summary, run, summarise  # noqa: E402

PROMPT, NEW, LEAST = 128, 64, 4
"""Tokens of a prompt and an answer; requests of a turn, at least."""
COLUMNS = (
    "server",
    "clients",
    "new tokens/s",
    "first token, ms",
    "between tokens, ms",
    "same tokens",
)
CASES = ("continuous", "prefix", "chunks")
console = Console(stderr=True)


@dataclass
class Turns:
    """What a server did at one number of clients, turn by turn.

    texts: answers of the last turn, by prompt. overhead: seconds of the event loop for a token.
    """

    summaries: list[Summary] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    overhead: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """New tokens a second, the median over turns."""
        return median(summary.token_rate for summary in self.summaries)


Measured = dict[str, dict[int, Turns]]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit status 1 if a server failed on a request."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        console.print("preparing the model …")
        files = prepare(Path(folder), options.llama_python)
        measured = measure(files, options, Path(folder))
        cases = {case: run_case(case, files) for case in options.cases}
    for lines in (server_lines(measured, files), case_lines(measured, cases)):
        show(lines, options.markdown)
    print(footer(options))
    if options.out is not None:
        options.out.write_text(json.dumps(as_json(measured, cases), indent=1))
    if options.plot is not None:
        draw(measured, options.plot)
    failed = sum(
        s.failed for turns in measured.values() for t in turns.values() for s in t.summaries
    )
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients, by commas")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--each", type=int, default=4, help="requests of a client in a turn")
    parser.add_argument("--transformers-python", help="interpreter with transformers[serving]")
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python[server], gguf")
    parser.add_argument("--cases", default=",".join(CASES), help="of the engine alone, by commas")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--out", type=Path, help="where all figures go, as JSON")
    options = parser.parse_args(arguments)
    try:
        options.clients = [int(each) for each in options.clients.split(",")]
    except ValueError:
        parser.error(f"--clients={options.clients}: numbers by commas, such as 1,8,32")
    options.cases = [case for case in options.cases.split(",") if case]
    for case in options.cases:
        if case not in CASES:
            parser.error(f"--cases: {case!r} is not one of {', '.join(CASES)}")
    if min(options.rounds, options.each, *options.clients) < 1:
        parser.error("--rounds, --each and --clients: at least 1")
    return options


def measure(files: Files, options: argparse.Namespace, folder: Path) -> Measured:
    """Each server's turns; servers run one after another, so that each has the machine alone."""
    makers: list[Callable[[int], servers.Peer]] = [lambda port: servers.sheaf(files, port)]
    if python := options.transformers_python:
        makers.append(lambda port: servers.transformers(files, port, python))
    if llama := options.llama_python:
        makers.append(lambda port: servers.llama_cpp(files, port, llama))
    measured: Measured = {}
    for turn in range(options.rounds):
        for make in makers:
            port = servers.free_port()
            peer = make(port)
            console.print(f"turn {turn + 1} of {options.rounds}: {peer.name}")
            turns = measured.setdefault(peer.name, {n: Turns() for n in options.clients})
            log = folder / f"{peer.name.replace(' ', '-')}.log"
            with servers.running(peer, port, log) as pid:
                take_turn(files, peer, port, pid, options.each, turns)
            if any(not t.texts for t in turns.values()):
                console.print(log.read_text(errors="replace")[-2000:], markup=False)
    return measured


def take_turn(
    files: Files, peer: servers.Peer, port: int, pid: int, each: int, turns: dict[int, Turns]
) -> None:
    """All numbers of clients at one running server."""
    load_once(files, peer, port, clients=2, count=4)  # Warms up.
    for clients, found in turns.items():
        before = servers.main_thread_seconds(pid)
        load = load_once(files, peer, port, clients, max(LEAST, each * clients))
        summary = summarise(load)
        busy = servers.main_thread_seconds(pid) - before
        found.summaries.append(summary)
        found.overhead.append(busy / max(summary.new_tokens, 1))
        found.texts = {record.index: record.text for record in load.records if not record.error}
        console.print(f"  {clients} clients: {summary.token_rate:,.1f} tokens/s")
        for kind, detail in summary.details.items():
            console.print(f"{peer.name}: {kind}: {detail}")


def load_once(files: Files, peer: servers.Peer, port: int, clients: int, count: int) -> Load:
    """Put a load of the same prompts on any server."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as listed:
        for prompt in prompts(files, count, PROMPT, seed=clients):
            listed.write(json.dumps({"prompt": prompt, "max_tokens": NEW}) + "\n")
        listed.flush()
        settings = LoadSettings(
            url=f"http://127.0.0.1:{port}", requests=count, clients=clients, prompts=listed.name,
            model=peer.model, ignore_eos=False, fields=peer.fields,
        )  # fmt: skip
        load = Load(settings)
        asyncio.run(run(load, None, lambda load: None))
    return load


def run_case(case: str, files: Files) -> dict[str, Any]:
    """A case of `serving_engine`, in a process of its own."""
    console.print(f"engine: {case}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, "-m", "benchmarks.serving_engine", case, str(files.checkpoint)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    console.print(f"  {found}")
    return found


def same(ours: dict[int, str], theirs: dict[int, str], tokenizer: Any) -> float:
    """The share of tokens that stand in the same place of both texts of a prompt."""
    pairs = []
    for index in ours.keys() & theirs.keys():
        one, other = (tokenizer.encode([text])[0].tolist() for text in (ours[index], theirs[index]))
        longest = max(len(one), len(other))
        pairs += [at < min(len(one), len(other)) and one[at] == other[at] for at in range(longest)]
    return sum(pairs) / max(len(pairs), 1)


def server_lines(measured: Measured, files: Files) -> list[list[str]]:
    """Rows of the first table, and what they say."""
    ours = measured["Sheaf"]
    lines = [list(COLUMNS)]
    for name, by_clients in measured.items():
        for clients, turns in by_clients.items():
            text = f"{turns.rate:,.0f}"
            if name != "Sheaf":
                text += f" (Sheaf {ours[clients].rate / max(turns.rate, 1e-9):.2f} x)"
            agreed = same(ours[clients].texts, turns.texts, files.tokenizer)
            times = (middle(turns, what) for what in ("first", "per_token"))
            cells = [text, *times, f"{agreed:.1%}"]
            if not turns.texts:
                cells = ["failed", "", "", ""]
            lines.append([name, str(clients), *cells])
    return lines


def middle(turns: Turns, what: str) -> str:
    """Median over turns of the median of a time, in ms."""
    found = [figures for s in turns.summaries if (figures := getattr(s, what)) is not None]
    return f"{1e3 * median(each.percentiles[0] for each in found):,.1f}" if found else ""


def case_lines(measured: Measured, cases: dict[str, Any]) -> list[list[str]]:
    """Rows of the second table: figure, measured, goal."""
    lines = [["figure", "measured", "goal"]]
    most = max(measured["Sheaf"])
    overhead = median(measured["Sheaf"][most].overhead)
    what = f"event loop's processor time for a token at {most} clients"
    lines.append([what, f"{1e3 * overhead:.3f} ms", "< 1 ms"])
    if found := cases.get("continuous"):
        ratio = found["continuous"] / found["static"]
        told = f"{ratio:.2f} x ({found['ideal']:.2f} x ideal)"
        lines.append(["continuous against static batching, tokens/s", told, ">= 1.4 x"])
    if found := cases.get("prefix"):
        on, off = found["on"], found["off"]
        told = f"{off['first'] / on['first']:.1f} x ({1e3 * on['first']:,.0f} ms)"
        lines.append(["time to the first token, prefix cache off against on", told, ">= 3 x"])
        computed = f"{on['computed']:,} of {off['computed']:,}"
        lines.append(["prompt tokens computed with the prefix cache", computed, "<= 2,048"])
    if found := cases.get("chunks"):
        told = f"{found['chunked'] / found['whole']:.2f} x ({1e3 * found['chunked']:,.0f} ms)"
        lines.append(["longest gap between tokens, chunks of 128 against whole", told, "<= 0.4 x"])
    return lines


def show(lines: list[list[str]], markdown: bool) -> None:
    """Print a table, its first line the head."""
    head, *rows = lines
    if markdown:
        for cells in (head, ["---"] * len(head), *rows):
            print("| " + " | ".join(cells) + " |")
        print()
        return
    table = Table(*head)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def footer(options: argparse.Namespace) -> str:
    """What it all ran on, and who was absent."""
    busy = max(os.getloadavg()[2] - os.cpu_count(), 0.0) if os.cpu_count() else 0.0
    said = [
        f"Medians of {options.rounds} turns, the client on the same machine; {os.cpu_count()} "
        f"cores; Python {platform.python_version()}; load beyond the cores {busy:.1f}."
    ]
    peers = {"transformers serve": "transformers_python", "llama-cpp-python": "llama_python"}
    for name, option in peers.items():
        if getattr(options, option) is None:
            said.append(f"{name} is absent: --{option.replace('_', '-')} was not given.")
    return "\n".join(said)


def as_json(measured: Measured, cases: dict[str, Any]) -> dict[str, Any]:
    """All figures."""
    rows = [
        {
            "server": name,
            "clients": clients,
            "tokens_per_second": [summary.token_rate for summary in turns.summaries],
            "first": [s.first and s.first.percentiles for s in turns.summaries],
            "between": [s.between and s.between.percentiles for s in turns.summaries],
            "overhead": turns.overhead,
        }
        for name, by_clients in measured.items()
        for clients, turns in by_clients.items()
    ]
    return {"servers": rows, "engine": cases}


def draw(measured: Measured, out: Path) -> None:
    """Throughput over clients, a line a server with its turns as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ("#0072B2", "#D55E00", "#009E73")
    for (name, by_clients), colour in zip(measured.items(), colours, strict=False):
        clients = list(by_clients)
        axes.plot(clients, [t.rate for t in by_clients.values()], "o-", color=colour, label=name)
        for count, turns in by_clients.items():
            rates = [summary.token_rate for summary in turns.summaries]
            axes.plot([count] * len(rates), rates, ".", color=colour, alpha=0.4)
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="new tokens/s")
    axes.set_xticks(clients, [str(each) for each in clients])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)


if __name__ == "__main__":
    sys.exit(main())
