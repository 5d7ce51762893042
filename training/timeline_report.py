"""What a run's timeline says: who is slow, what grows, and two pictures of it.

RUN/timeline/heatmap.png   step time and busy time, hosts by steps
RUN/timeline/trace.json    the spans themselves, for Perfetto or chrome://tracing

Ranks are compared by the time in which they were busy by themselves: step times are equal, because
all wait for the slowest. After MegaScale (arXiv 2402.15627), section 5.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from training import json_lines
from training.stragglers import Straggler, stragglers
from training.timeline import APART, WAITING

Row = Mapping[str, Any]
DRIFT_SHARE = 0.05
"""Growth of a span over the run, as a share of a step, from which it is worth a line."""
LEAST_ROWS = 8
"""Rows without which nothing is said about a drift."""
MOST_COLUMNS = 400
"""Of the heat map."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """The timeline of one process.

    host: where it ran last. rows: one for each step that counts, by step; of a step that was done
        again after a restart, the last.
    """

    process: int
    host: str
    rows: tuple[Row, ...]

    def seconds(self, row: Row) -> float:
        """A row's seconds a step, evaluations and checkpoints left out."""
        return (row["seconds"] - sum(row["spans"].get(name, 0.0) for name in APART)) / row["steps"]

    def busy(self, row: Row) -> float:
        """Those of them in which this process waited for nobody."""
        waiting = sum(row["spans"].get(name, 0.0) for name in WAITING) / row["steps"]
        return max(self.seconds(row) - waiting, 0.0)


@dataclasses.dataclass(frozen=True)
class Drift:
    """A span that grows over a run: seconds a step more with each step, and over all of it."""

    process: int
    host: str
    span: str
    slope: float
    growth: float

    def __str__(self) -> str:
        return (
            f"{self.span} of process {self.process} on {self.host} grows by {self.slope * 1e6:.2f} "
            f"us a step, {self.growth * 1e3:.1f} ms over the run"
        )


def load(folder: Path) -> list[Rank]:
    """The ranks of a run, by number. Raises `ValueError` if there is no timeline."""
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
    ranks = [rank for path in paths if (rank := _rank(path)).rows]
    if not ranks:
        raise ValueError(
            f"{folder} holds no steps: is this a run, and was train.timeline_every 0 or above the "
            "number of its steps?"
        )
    return ranks


def _rank(path: Path) -> Rank:
    host, rows = "", {}
    for row in json_lines.read(path):
        if "step" in row:
            rows = {step: old for step, old in rows.items() if step < row["step"]} | {
                row["step"]: row
            }
        else:
            host = row["host"]
    return Rank(int(path.stem), host, tuple(rows.values()))


def slow(ranks: Sequence[Rank]) -> list[Straggler]:
    """Who is busy longer than the median, by `training.stragglers`, over all rows."""
    middles = [
        [median(rank.seconds(row) for row in rank.rows), median(map(rank.busy, rank.rows)), 0.0]
        for rank in ranks
    ]
    numbers = [rank.process for rank in ranks]
    found = stragglers(np.array(middles, np.float32))
    return [dataclasses.replace(each, process=numbers[each.process]) for each in found]


def drifts(ranks: Sequence[Rank]) -> list[Drift]:
    """Spans that grow by more than `DRIFT_SHARE` of a step from a run's first rows to its last.

    The slope is Theil and Sen's, the median of those between all pairs of rows, which a few long
    steps do not move.
    """
    found = []
    for rank in ranks:
        rows = rank.rows[:: max(len(rank.rows) // 200, 1)]
        if len(rows) < LEAST_ROWS:
            continue
        step = median(map(rank.seconds, rows))
        for name in sorted({name for row in rows for name in row["spans"]} - set(APART)):
            seconds = [row["spans"].get(name, 0.0) / row["steps"] for row in rows]
            slope = theil_sen([row["step"] for row in rows], seconds)
            growth = slope * (rows[-1]["step"] - rows[0]["step"])
            if growth > DRIFT_SHARE * step:
                found.append(Drift(rank.process, rank.host, name, slope, growth))
    return found


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points, `[n], [n]` with n at least 2."""
    x_array, y_array = np.asarray(x, np.float64), np.asarray(y, np.float64)
    first, second = np.triu_indices(len(x_array), 1)
    return float(np.median((y_array[second] - y_array[first]) / (x_array[second] - x_array[first])))


def clock_offsets(ranks: Sequence[Rank]) -> dict[int, float]:
    """Seconds to add to a rank's clock to have that of the first.

    Waits for one step end together, whenever they began, so their ends show the clocks.
    """
    ends = [{row["step"]: end for row in rank.rows if (end := _wait_end(row))} for rank in ranks]
    offsets = {}
    for rank, own in zip(ranks, ends, strict=True):
        both = own.keys() & ends[0].keys()
        offsets[rank.process] = median(ends[0][s] - own[s] for s in both) if both else 0.0
    return offsets


def _wait_end(row: Row) -> float | None:
    waits = [begin + seconds for name, begin, seconds in row["last"] if name == "wait"]
    return row["start"] + waits[-1] if waits else None


def chrome_trace(ranks: Sequence[Rank]) -> dict[str, Any]:
    """The last step of each row in Chrome's trace format: a process a rank, clocks aligned."""
    offsets = clock_offsets(ranks)
    zero = min(row["start"] + offsets[rank.process] for rank in ranks for row in rank.rows)
    events: list[dict[str, Any]] = []
    for rank in ranks:
        name = f"process {rank.process} on {rank.host}"
        events.append(
            {"ph": "M", "name": "process_name", "pid": rank.process, "args": {"name": name}}
        )
        for row in rank.rows:
            start = row["start"] + offsets[rank.process] - zero
            events += [
                {
                    "ph": "X",
                    "name": span,
                    "pid": rank.process,
                    "tid": 0,
                    "ts": round((start + begin) * 1e6, 1),
                    "dur": round(seconds * 1e6, 1),
                    "args": {"step": row["step"]},
                }
                for span, begin, seconds in row["last"]
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def grid(ranks: Sequence[Rank], what: str) -> tuple[np.ndarray, np.ndarray]:
    """`(steps [columns], milliseconds [ranks, columns])` of "seconds" or "busy"; NaN: unknown."""
    steps = sorted({row["step"] for rank in ranks for row in rank.rows})
    width = -(-len(steps) // MOST_COLUMNS)
    columns = {step: i // width for i, step in enumerate(steps)}
    total = np.zeros((2, len(ranks), -(-len(steps) // width)))
    for line, rank in enumerate(ranks):
        for row in rank.rows:
            total[:, line, columns[row["step"]]] += (1e3 * getattr(rank, what)(row), 1.0)
    with np.errstate(invalid="ignore"):
        return np.array(steps[::width]), total[0] / total[1]


def plot(ranks: Sequence[Rank], out: Path) -> Path:
    """Draw the heat map: step time above, busy time below, one line a rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes long to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4 + 0.5 * min(len(ranks), 24)), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"seconds": "step, ms", "busy": "busy by itself, ms"}
    for axes, (what, title) in zip(figure.subplots(2, 1), titles.items(), strict=True):
        steps, values = grid(ranks, what)
        extent = (float(steps[0]), float(steps[-1]) + 1, len(ranks) - 0.5, -0.5)
        high = float(np.nanpercentile(values, 98))
        image = axes.imshow(
            values, aspect="auto", interpolation="nearest", extent=extent, vmin=0, vmax=high
        )
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
        shown = range(0, len(ranks), max(len(ranks) // 24, 1))
        axes.set_yticks(list(shown), [f"{ranks[i].process} {ranks[i].host}" for i in shown])
    axes.set_xlabel("step")
    figure.savefig(out, dpi=120)
    return out


def table(ranks: Sequence[Rank]) -> str:
    """A line a rank: medians a step, in milliseconds."""
    names = sorted({n for rank in ranks for row in rank.rows for n in row["spans"]} - set(APART))
    lines = ["  ".join(f"{name:>10}" for name in ("process", "host", "step", "busy", *names))]
    for rank in ranks:
        values = [median(map(rank.seconds, rank.rows)), median(map(rank.busy, rank.rows))]
        values += [
            median(row["spans"].get(name, 0.0) / row["steps"] for row in rank.rows)
            for name in names
        ]
        cells = [str(rank.process), rank.host, *(f"{1e3 * value:.2f}" for value in values)]
        lines.append("  ".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def show(run: Path, out: Path | None = None) -> str:
    """Write the pictures of a run's timeline, and say what it holds."""
    ranks = load(run / "timeline")
    out = out or run / "timeline"
    out.mkdir(parents=True, exist_ok=True)
    hosts = {rank.process: rank.host for rank in ranks}
    named = [f"{each}, on {hosts[each.process]}" for each in slow(ranks)]
    lines = [table(ranks), *(named or ["no process is slow"])]
    lines += [str(drift) for drift in drifts(ranks)] or ["no span grows"]
    heatmap = plot(ranks, out / "heatmap.png")
    trace = out / "trace.json"
    trace.write_text(json.dumps(chrome_trace(ranks)))
    return "\n".join([*lines, f"heat map: {heatmap}", f"trace: {trace}"])
