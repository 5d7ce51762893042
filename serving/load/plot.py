"""A load as a picture: how latencies are distributed, and what the server did over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serving.load.drive import Load
from serving.load.record import Record

COLOURS = ("#0072B2", "#D55E00", "#009E73")
"""Okabe and Ito's, for colour-blind readers."""
BINS = 60


def draw(load: Load, out: Path) -> Path:
    """Draw the requests that were answered; the kind of file is that of the name's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes long to import
    from matplotlib.figure import Figure

    done = [record for record in load.records if record.error is None]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _distributions(left, done)
    _over_time(right, done)
    figure.suptitle(f"{load.model}: {len(done)} of {len(load.planned)} requests answered")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _distributions(axes, done: Sequence[Record]) -> None:
    series = {
        "first token": [record.first for record in done if record.first is not None],
        "between tokens": [gap for record in done for gap in record.gaps],
        "end to end": [record.seconds for record in done],
    }
    for (name, values), colour in zip(series.items(), COLOURS, strict=True):
        if values:
            ordered = np.maximum(np.sort(values) * 1e3, 1e-3)
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, share, where="post", color=colour, label=name)
    axes.set(xscale="log", xlabel="milliseconds", ylabel="share at most so long", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if done:
        axes.legend(loc="lower right")


def _over_time(axes, done: Sequence[Record]) -> None:
    """New tokens a second, and requests under way."""
    end = max((record.ended for record in done), default=1.0)
    edges = np.linspace(0.0, end, BINS + 1)
    at = [record.sent + time for record in done for time in record.times]
    weights = np.ones(len(at))
    if not at:
        at, weights = [r.ended for r in done], np.array([r.completion_tokens for r in done], float)
    tokens, _ = np.histogram(at, edges, weights=weights)
    axes.stairs(tokens / np.diff(edges), edges, fill=True, alpha=0.5, color=COLOURS[0])
    axes.set(xlabel="seconds", ylabel="new tokens/s", xlim=(0, end), ylim=(0, None))
    axes.yaxis.label.set_color(COLOURS[0])
    under = axes.twinx()
    moments = np.sort([record.sent for record in done] + [record.ended for record in done])
    sent, ended = (np.sort([getattr(r, name) for r in done]) for name in ("sent", "ended"))
    running = np.searchsorted(sent, moments, "right") - np.searchsorted(ended, moments, "right")
    under.step(moments, running, where="post", color=COLOURS[1], linewidth=1)
    under.set(ylabel="requests under way", ylim=(0, None))
    under.yaxis.label.set_color(COLOURS[1])
