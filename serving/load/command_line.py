"""`python -m serving bench`: put load on a server and print what it does."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serving.command_line import KEY_VARIABLE, add_fields, given
from serving.load import plot, report
from serving.load.client import ServerError
from serving.load.drive import Load, run
from serving.load.settings import LoadSettings

FAILED, WRONG, INTERRUPTED = 1, 2, 130
DESCRIPTION = """\
Put load on any server with OpenAI's API, and print latencies and throughput.

  python -m serving bench --url=http://127.0.0.1:8000 --requests=200 --clients=16
  python -m serving bench --rate=4 --prompt-tokens=lognormal:200,0.6 --new-tokens=uniform:8,256

Ctrl-C prints what there is so far. The status is 0, 1 if a request failed, 2 for wrong input or no
server, 130 if it was interrupted.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `bench` to the commands of `python -m serving`."""
    parser = commands.add_parser(
        "bench",
        help="put load on a server and time it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_fields(parser, LoadSettings)
    parser.set_defaults(run=bench)


def bench(known: argparse.Namespace) -> int:
    """Run a load; the exit status."""
    try:
        load = Load(LoadSettings(**given(vars(known), LoadSettings)))
        interrupted = _run(load)
    except (ServerError, ValueError, OSError) as error:
        print(f"python -m serving bench: {error}", file=sys.stderr)
        return WRONG
    summary = report.summarise(load)
    Console().print(report.table(summary))
    print("\n".join(report.lines(summary)))
    return INTERRUPTED if interrupted else FAILED if summary.failed else 0


def _run(load: Load) -> bool:
    """Run it with a bar, and write its files; whether it was interrupted."""
    settings, interrupted = load.settings, False
    key = settings.api_key or os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY")
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=settings.requests, what="")

        def show(load: Load) -> None:
            tokens = sum(record.completion_tokens for record in load.records)
            what = f"{load.under_way} under way, {tokens / load.seconds:,.0f} tokens/s"
            progress.update(task, completed=len(load.records), what=what)

        try:
            asyncio.run(run(load, key, show))
        except KeyboardInterrupt:
            interrupted = True
    _write(load)
    return interrupted


def _write(load: Load) -> None:
    settings = load.settings
    if settings.out is not None:
        out = Path(settings.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps(record.as_row()) + "\n" for record in load.records)
        out.write_text("".join(rows), encoding="utf-8")
    if settings.plot is not None and load.records:
        plot.draw(load, Path(settings.plot))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m serving`; `run` in it is what to call."""
    parser = argparse.ArgumentParser(prog="python -m serving", allow_abbrev=False)
    add_command(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(arguments)
