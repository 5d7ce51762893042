"""`python -m kernels_pallas tune` measures block sizes on the device at hand and keeps them; `show`
prints what is known for a device.

    python -m kernels_pallas tune --kernels=grouped_matmul.blocks --budget-seconds=600
    python -m kernels_pallas tune --shapes=rows_per_group=64:d_in=256:d_out=1024
    python -m kernels_pallas show

Ctrl-C stops tuning and loses nothing that was measured; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from kernels_pallas.tuning.key import Key
    from kernels_pallas.tuning.measure import Limits, Measured
    from kernels_pallas.tuning.store import Choice, Table
    from kernels_pallas.tuning.tunable import Tunable


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for wrong input, 130 after Ctrl-C."""
    known = _parser().parse_args(arguments)
    try:
        return {"tune": tune, "show": show}[known.command](known)
    except (ValueError, OSError) as error:
        print(f"python -m kernels_pallas: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tuning = commands.add_parser("tune", help="measure block sizes on this device")
    tuning.add_argument("--kernels", metavar="A,B", help="else all that run on this platform")
    tuning.add_argument(
        "--shapes", metavar="A,B", help="names, or sizes such as rows=64:d_in=256; else all"
    )
    tuning.add_argument(
        "--budget-seconds", type=float, default=600.0, metavar="S", help="of the whole run (600)"
    )
    tuning.add_argument("--again", action="store_true", help="also what was measured before")
    showing = commands.add_parser("show", help="print what was measured")
    showing.add_argument("--kernels", metavar="A,B", help="else all")
    showing.add_argument("--device-kind", help="else this machine's; as JAX names it")
    for command in (tuning, showing):
        command.add_argument(
            "--table", type=Path, metavar="FILE", help="else the user's cache (show: and shipped)"
        )
    return parser


@dataclass(frozen=True)
class Work:
    """One key to measure, of a shape as the user named it."""

    kernel: str
    shape: str
    key: Key


def tune(known: argparse.Namespace) -> int:
    """Measure what is asked for and not known yet, until the budget is spent."""
    from rich.console import Console

    from kernels_pallas.target import current_target
    from kernels_pallas.tuning.key import device_name
    from kernels_pallas.tuning.store import cache_file

    began, target = time.perf_counter(), current_target()
    kind = device_name(target.device_kind)
    path = known.table or cache_file(kind)
    work = list(plan(known.kernels, known.shapes, target.platform, kind))
    left = work if known.again else [one for one in work if not _is_known(path, one.key)]
    console = Console(stderr=True)
    console.print(f"{len(left)} of {len(work)} to measure on {kind}; into {path}")
    kept = 0
    try:
        for _ in _measure_all(left, path, began + known.budget_seconds, console):
            kept += 1
    except KeyboardInterrupt:
        console.print(f"interrupted: {kept} kept; the same command goes on from there")
        return 130
    if kept < len(left):
        console.print(f"{len(left) - kept} left: the same command goes on from there")
    return 0


def plan(
    kernels: str | None, shapes: str | None, platform: str, device_kind: str
) -> Iterable[Work]:
    """What to measure: comma-separated kernels and shapes; None is all.

    Raises `ValueError` for a name that is not known, or a kernel of another platform.
    """
    from kernels_pallas.tuning.kernels import KERNELS

    here = [name for name, kernel in KERNELS.items() if kernel.platform == platform]
    chosen = _names(kernels, KERNELS, "kernel") if kernels else here
    for name in chosen:
        if name not in here:
            raise ValueError(
                f"kernel {name!r} runs on {KERNELS[name].platform}, and this is {platform}: "
                f"{', '.join(here) or 'no kernel'} can be tuned here"
            )
    every = {shape: None for name in chosen for shape in KERNELS[name].shapes}
    for shape in _names(shapes, every, "shape") if shapes else every:
        found = {name: _sizes(shape, KERNELS[name].shapes) for name in chosen}
        if not any(found.values()):
            known = {name: sorted(next(iter(KERNELS[name].shapes.values()))) for name in chosen}
            raise ValueError(f"shape {shape!r} has the sizes of no kernel; they are {known}")
        for name, sizes in found.items():
            keys = KERNELS[name].keys(sizes, device_kind) if sizes else ()
            yield from (Work(name, shape, key) for key in keys)


def _names(text: str, known: Iterable[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known and not (what == "shape" and "=" in name):
            near = ", ".join(difflib.get_close_matches(name, list(known), cutoff=0.0))
            raise ValueError(f"{what} {name!r} is not known; nearest: {near or 'none here'}")
    return names


def _sizes(shape: str, shapes: Mapping[str, Mapping[str, int]]) -> Mapping[str, int] | None:
    """Sizes of a named shape, or of one such as "rows=64:d_in=256"; None if another kernel's."""
    if "=" not in shape:
        return shapes.get(shape)
    pairs = [part.partition("=") for part in shape.split(":")]
    if sorted(name for name, _, _ in pairs) != sorted(next(iter(shapes.values()))):
        return None
    if not all(value.isdigit() and int(value) > 0 for _, _, value in pairs):
        raise ValueError(f"shape {shape!r} has a size that is no positive whole number")
    return {name: int(value) for name, _, value in pairs}


def _is_known(path: Path, key: Key) -> bool:
    import jax

    from kernels_pallas.tuning.key import is_current
    from kernels_pallas.tuning.store import read

    choice = read(path).get(key.bucket())
    if choice is None or choice.jax != jax.__version__:
        return False
    return is_current(key.kernel, choice.code)


def _measure_all(
    work: Sequence[Work], path: Path, deadline: float, console: Console
) -> Iterable[Work]:
    """Measure one after the other, each written before the next; gives back what is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    from kernels_pallas.tuning.kernels import KERNELS
    from kernels_pallas.tuning.measure import Limits
    from kernels_pallas.tuning.store import write

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=console) as bar:
        task = bar.add_task("tuning", total=len(work), now="")
        limits = Limits(deadline, say=lambda text: bar.update(task, now=text))
        for one in work:
            if limits.clock() > deadline:
                return
            bar.update(task, description=f"{one.kernel} {one.shape}", now="")
            measured = _attempt(KERNELS[one.kernel], one.key, limits)
            console.print(_line(one.key, measured), highlight=False, soft_wrap=True)
            if measured.choice is not None:
                write(path, {one.key.bucket(): measured.choice})
                bar.advance(task)
                yield one
            if measured.interrupted:
                raise KeyboardInterrupt


def _attempt(kernel: Tunable, key: Key, limits: Limits) -> Measured:
    """A call that cannot be made, for want of memory perhaps, does not keep others from theirs."""
    from kernels_pallas.tuning.measure import Measured, in_a_line, measure

    try:
        case, candidates, default = kernel.case(key), kernel.candidates(key), kernel.default(key)
        return measure(key, case, candidates, default, limits)
    except Exception as error:
        return Measured(discarded={"the plain function": in_a_line(error)})


def _line(key: Key, measured: Measured) -> str:
    from kernels_pallas.tuning.measure import name_of

    choice = measured.choice
    reasons = "".join(f"; not {name}: {why}" for name, why in measured.discarded.items())
    if choice is None:
        return f"{key}: {'nothing to choose' if reasons else 'no time left'}{reasons}"
    gain = f", {_gain(choice)} times the default's speed" if _gain(choice) else ""
    return f"{key}: {name_of(choice.blocks)}, {_milliseconds(choice)} ms{gain}{reasons}"


def show(known: argparse.Namespace) -> int:
    """Print the choices of the cache and the shipped tables, or of one file."""
    from rich.console import Console

    from kernels_pallas.target import current_target
    from kernels_pallas.tuning.key import device_name
    from kernels_pallas.tuning.store import cache_file, read, shipped_file

    kind = device_name(known.device_kind or current_target().device_kind)
    paths = [known.table] if known.table else [cache_file(kind), shipped_file(kind)]
    if known.table is not None and not known.table.is_file():
        raise ValueError(f"table {known.table} is no file")
    console = Console(width=None if sys.stdout.isatty() else 160)
    for path in paths:
        table = read(path)
        console.print(f"{path}: {len(table)} choices", highlight=False, soft_wrap=True)
        for kernel in sorted({key.kernel for key in table}):
            if not known.kernels or kernel in known.kernels.split(","):
                _print(console, kernel, {k: v for k, v in table.items() if k.kernel == kernel})
    return 0


def _print(console: Console, kernel: str, table: Table) -> None:
    """The choices of one kernel; a column for each option, size and block."""
    from rich.table import Table as Grid

    from kernels_pallas.tuning.key import is_current

    calls = {key: {"type": key.dtype, **dict(key.options), **dict(key.sizes)} for key in table}
    columns = list(dict.fromkeys(name for call in calls.values() for name in call))
    blocks = list(dict.fromkeys(name for one in table.values() for name in one.blocks))
    grid = Grid(title=kernel, title_justify="left")
    for name in (*columns, *(f"block {name}" for name in blocks), "ms", "gain", "state"):
        grid.add_column(name, overflow="fold")
    for key in sorted(table, key=lambda key: (key.dtype, key.options, key.sizes)):
        choice = table[key]
        state = choice.source if is_current(kernel, choice.code) else "stale"
        row = [calls[key].get(name, "") for name in columns]
        row += [choice.blocks.get(name, "") for name in blocks]
        grid.add_row(*map(str, row), _milliseconds(choice), _gain(choice), state)
    console.print(grid)


def _milliseconds(choice: Choice) -> str:
    return "" if choice.seconds is None else f"{choice.seconds * 1e3:.4g}"


def _gain(choice: Choice) -> str:
    """How many times the default's speed; empty where either was not timed."""
    if choice.seconds is None or choice.default_seconds is None:
        return ""
    return f"{choice.default_seconds / choice.seconds:.2f}"
