"""Every quantization method at several bits on one checkpoint: what it costs and what it saves.

    python benchmarks/quantization.py --checkpoint=A --text=calibration.jsonl.gz
        --held-out=valid.jsonl.gz [--methods=rtn,gptq,...] [--bits=8,4,3,2] [--groups=64,0]
        [--seeds=0,1,2] [--inject=4x60] [--out=rows.jsonl] [--plot=FILE.svg] [--table=FILE.md]

One row a method, bits and group (0: one group a column): loss on held-out text and how much more
that is than the unquantized model's, with the standard error over windows; KL divergence from that
model and how often both have the same likeliest token; honest bits, bytes on disk, seconds to
quantize with compilation, and speed of decoding beside the unquantized model. Rows are in `--out`
as they come, and the same command goes on after them. `--inject` adds rows of the same model with
outlier channels planted, for the methods that are about them.

Under the table stands what papers claim of the order of methods, with the verdict of these rows:
differences of losses window by window, with the error over windows and calibration seeds.

Exit status: 1 if a row failed, 2 for wrong input, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without an installation

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import quantization_cases as catalogue
from benchmarks import quantization_claims as claims
from benchmarks import quantization_measure as measure
from benchmarks import quantization_plot as plot
from benchmarks import quantization_report as report
from benchmarks.quantization_cases import Case
from data import Tokenizer, load_tokenizer, open_source
from model import Runtime, checkpoint
from model.checkpoint_folder import COMMIT, CheckpointError
from surgery import (
    Folder,
    InMemory,
    Options,
    SavedStatistics,
    consecutive,
    draw,
    inject_outliers,
    quantize,
)
from surgery.quantize.driver import check_targets
from surgery.report import summary
from surgery.source import dense
from training import json_lines
from weights import flatten

UNQUANTIZED = Case("unquantized", "none", {}, None, None)
PLANTED = Case("unquantized", "none", {}, None, None, planted=True)
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run, print and draw; see the module for the exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as work:
        try:
            sweep = Sweep(options, Path(work))
            cases = all_cases(options)
        except (CheckpointError, ValueError, OSError, ImportError) as error:
            print(f"quantization: {error}", file=sys.stderr)
            return 2
        return run(sweep, cases, options)


def run(sweep: Sweep, cases: list[Case], options: argparse.Namespace) -> int:
    """The rows, the tables and the plot; the exit status."""
    rows: list[Row] = []
    status = 0
    try:
        for row in sweep.rows(cases):
            rows.append(row)
    except KeyboardInterrupt:
        print("interrupted: what follows is what was done", file=sys.stderr)
        status = 130
    verdicts = claims.judge(rows)
    print(sweep.in_words())
    report.show(rows, verdicts)
    if options.table:
        options.table.write_text(report.markdown(sweep.in_words(), rows, verdicts))
    if options.plot and plot.drawable(rows):
        plot.draw(rows, options.plot, sweep.in_words())
    return status or int(any(row["state"] == "failed" for row in rows))


def all_cases(options: argparse.Namespace) -> list[Case]:
    """Those of the model as it is, then those of the model with outliers planted."""
    which = (options.methods, options.bits, options.groups, options.seeds)
    found = [UNQUANTIZED, *catalogue.cases(*which)]
    if options.inject is not None:
        found += [PLANTED, *catalogue.cases(*which, planted=True)]
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint or run folder of plain arrays")
    add("--text", required=True, help="calibration text: a file, a folder, a glob, or stdlib:")
    add("--held-out", required=True, help="text to measure with")
    add("--text-key", default="text", help="field or column of the text")
    add("--methods", default="", help="methods or variants, separated by commas; all by default")
    add("--bits", type=numbers(2, 8), default="8,4,3,2")
    add("--groups", type=numbers(0), default="64,0", help="input channels a scale; 0: all")
    add("--seeds", type=numbers(0), default="0", help="of the calibration windows")
    add("--windows", type=int, default=128, help="calibration windows")
    add("--held-out-windows", type=int, default=64)
    add("--length", type=int, default=0, help="tokens a window; 0: 2048 or all positions")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of activations")
    add("--inject", type=planted, metavar="CHANNELSxFACTOR", help="also with outliers, like 4x60")
    add("--decode-tokens", type=int, default=64, help="0: no timing")
    add("--rounds", type=int, default=5, help="of the timing")
    add("--out", type=Path, metavar="FILE", help="a line of JSON a row, as it comes")
    add("--plot", type=picture, metavar="FILE", help="svg, png or pdf")
    add("--table", type=Path, metavar="FILE", help="the tables in Markdown")
    options = parser.parse_args(arguments)
    for name, least in (("windows", 1), ("held_out_windows", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}={getattr(options, name)}: give {least} or more")
    try:
        names = [name for name in options.methods.split(",") if name]
        options.methods = catalogue.chosen(names)
    except ValueError as error:
        parser.error(str(error))
    return options


def numbers(least: int, most: int | None = None) -> Any:
    """A parser of whole numbers separated by commas, each from `least` to `most`."""

    def read(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: whole numbers, like 4,3") from None
        for number in found:
            if number < least or (most is not None and number > most):
                right = f"{least} or more" if most is None else f"{least} to {most}"
                raise argparse.ArgumentTypeError(f"{number} is not {right}")
        return found

    return read


def planted(text: str) -> tuple[int, float]:
    """Channels and factor of `4x60`."""
    channels, _, factor = text.partition("x")
    try:
        found = int(channels), float(factor)
    except ValueError:
        found = 0, 0.0
    if found[0] < 1 or not found[1] > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: channels and factor, like 4x60")
    return found


def picture(text: str) -> Path:
    """A file that a plot can be written to."""
    path = Path(text)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text}: its name must end with .svg, .png or .pdf")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.absolute().parent}")
    return path


@dataclass(frozen=True)
class Calibration:
    """Windows `int32[windows, length]`, which they are, and a folder for their statistics."""

    tokens: np.ndarray
    name: str
    folder: Path

    def statistics(self, planted: bool) -> SavedStatistics:
        """Those of the model's own layers, which methods share."""
        return SavedStatistics(self.folder / f"{self.name}-{planted}", {"planted": planted})


class Sweep:
    """One checkpoint, its texts, and the rows made of them."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        folder = dense(Folder(options.checkpoint))
        if options.inject is not None and options.inject[0] > folder.config.d_model:
            channels = options.inject[0]
            raise ValueError(f"--inject: {channels} channels of {folder.config.d_model} (d_model)")
        self.options, self.config = options, folder.config
        self.files = folder.files
        self.work = work
        self.runtime = Runtime(compute_dtype=options.dtype)
        tokenizer = load_tokenizer(folder.files)
        length = options.length or min(2048, self.config.max_length)
        source = open_source(options.held_out, options.text_key)
        held_out = consecutive(source, tokenizer, length, options.held_out_windows)
        self.calibrations = self._calibrations(tokenizer, length)
        self.tokens = held_out.tokens
        self.params = checkpoint.load(folder.folder).params
        self.which = {
            "checkpoint": hashlib.sha256((folder.folder / COMMIT).read_bytes()).hexdigest()[:12],
            "held_out": held_out.record["sha256"][:12],
            "dtype": options.dtype,
            "decode_tokens": options.decode_tokens,
        }
        if options.out is not None:
            json_lines.cut(options.out, lambda row: True)  # a line that a kill tore
        known = json_lines.read(options.out) if options.out is not None else []
        self.known = [row for row in known if all(row.get(k) == v for k, v in self.which.items())]

    @functools.cache  # noqa: B019 (one sweep a run)
    def reference(self, planted: bool) -> measure.Reference:
        """The unquantized model, as it is or with outliers planted."""
        params = self.params
        if planted:
            params = inject_outliers(self.config, params, *self.options.inject)
        return measure.Reference(self.config, params, self.tokens, self.runtime)

    def in_words(self) -> str:
        """What the rows have in common."""
        found, options = self.which, self.options
        outliers = "" if options.inject is None else f", outliers {outliers_of(options)} if planted"
        return (
            f"{Path(options.checkpoint).name or 'checkpoint'} ({found['checkpoint']}), "
            f"{len(self.tokens)} held-out windows of {self.tokens.shape[1]} tokens, "
            f"{options.windows} calibration windows, {found['dtype']}{outliers}"
        )

    def rows(self, cases: list[Case]) -> Iterator[Row]:
        """A row of each case: one of the file, or measured and added to it."""
        with progress(len(cases)) as bar:
            for case in cases:
                row = self._known(case)
                if row is None:
                    row = self._row(case, bar)
                    if self.options.out is not None and row["state"] != "failed":
                        json_lines.append(self.options.out, row, durable=True)
                    bar.say(f"{case.label}: {said(row)}")
                bar.advance()
                yield row

    def _identity(self, case: Case) -> Row:
        calibration = None if case.seed is None else self.calibrations[case.seed].name
        return {
            **self.which,
            "inject": outliers_of(self.options) if case.planted else None,
            "name": case.name,
            "label": case.label,
            "method": case.method,
            "settings": dict(case.settings),
            "bits": case.bits,
            "group": case.group,
            "seed": case.seed,
            "calibration": calibration,
        }

    def _known(self, case: Case) -> Row | None:
        wanted = self._identity(case)
        return next(
            (row for row in self.known if all(row.get(k) == v for k, v in wanted.items())), None
        )

    def _row(self, case: Case, bar: Bar) -> Row:
        row = self._identity(case)
        try:
            found = self._plain(case) if case.method == "none" else self._quantized(case, bar)
            return {**row, "state": "measured", **found}
        except Undefined as error:
            return {**row, "state": "left out", "error": str(error)}
        except Exception as error:  # the other rows are worth having
            return {**row, "state": "failed", "error": f"{type(error).__name__}: {error}"}

    def _plain(self, case: Case) -> Row:
        reference = self.reference(case.planted)
        leaves = flatten(reference.params)
        kernels = [leaf for path, leaf in leaves.items() if path.endswith("/kernel")]
        bits = 8.0 * sum(k.nbytes for k in kernels) / sum(k.size for k in kernels)
        found = {"nominal_bits": bits, "honest_bits": bits, "quantize_seconds": 0.0}
        return {**found, **self._measured(case, reference.params)}

    def _quantized(self, case: Case, bar: Bar) -> Row:
        source = InMemory(self.config, self.reference(case.planted).params)
        try:
            method = case.build()
            check_targets(source, method, Options())
        except ValueError as error:
            raise Undefined(str(error)) from None
        tokens = statistics = None
        shared = 0.0  # seconds of a pass that an earlier row made
        if case.seed is not None:
            tokens = self.calibrations[case.seed].tokens
            statistics = self.calibrations[case.seed].statistics(case.planted)
            shared = statistics.seconds if method.inputs == "fp" else 0.0
        began = time.perf_counter()
        params, layers = quantize(
            source,
            method,
            tokens,
            runtime=self.runtime,
            statistics=statistics,
            progress=lambda done, total, _: bar.note(f"{case.label}: layer {done}/{total}"),
        )
        found = {"quantize_seconds": shared + time.perf_counter() - began}
        bits = summary(layers)
        found |= {"nominal_bits": bits["nominal_bits"], "honest_bits": bits["bits"]}
        return {**found, **self._measured(case, params)}

    def _measured(self, case: Case, params: Any) -> Row:
        reference, options = self.reference(case.planted), self.options
        runs = measure.ready(params, self.runtime)
        found: Row = measure.quality(reference.compare(runs), reference.losses)
        found["bytes_on_disk"] = measure.bytes_on_disk(self.config, params, self.files)
        if options.decode_tokens and case.seed in (None, options.seeds[0]):
            speed = measure.decode_speed(reference, runs, options.decode_tokens, options.rounds)
            found.update(speed)
        return found

    def _calibrations(self, tokenizer: Tokenizer, length: int) -> dict[int, Calibration]:
        source = open_source(self.options.text, self.options.text_key)
        drawn = {
            seed: draw(source, tokenizer, self.options.windows, length, seed)
            for seed in self.options.seeds
        }
        return {
            seed: Calibration(windows.tokens, windows.record["sha256"][:12], self.work)
            for seed, windows in drawn.items()
        }


class Undefined(Exception):
    """A method has no sense at these bits or groups, or for this model."""


def outliers_of(options: argparse.Namespace) -> str:
    """`4x60`."""
    return "{}x{:g}".format(*options.inject)


def said(row: Row) -> str:
    """A row in a few words."""
    if row["state"] != "measured":
        return f"{row['state']}, {row['error']}"
    return f"{row['honest_bits']:.3f} bits, ΔNLL {row['delta_nll']:+.4f}"


@dataclass(frozen=True)
class Bar:
    """Rows done, of all; lines of text where there is no terminal."""

    progress: Progress
    task: Any
    console: Console

    def note(self, text: str) -> None:
        """What is going on."""
        self.progress.update(self.task, note=text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def advance(self) -> None:
        """A row is done."""
        self.progress.update(self.task, advance=1, note="")


@contextmanager
def progress(total: int) -> Iterator[Bar]:
    """A bar on standard error."""
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), TextColumn("row {task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(
        *columns,
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    ) as shown:
        yield Bar(shown, shown.add_task("", total=total, note=""), console)


if __name__ == "__main__":
    raise SystemExit(main())
