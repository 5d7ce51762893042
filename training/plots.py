"""`loss.png` of a run: training and validation loss over steps, with the learning rate below."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from training import json_lines


def plot_loss(metrics: Path, evaluations: Path, out: Path, title: str = "") -> Path:
    """Draw `metrics.jsonl` and `evaluations.jsonl`; points that are not finite are left out.

    Raises `ValueError` if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes long to import
    from matplotlib.figure import Figure

    steps, losses = _series(json_lines.read(metrics), "loss")
    at, validation = _series(json_lines.read(evaluations), "loss")
    if not len(steps) and not len(at):
        raise ValueError(f"{metrics} and {evaluations} hold no loss to draw")
    rate_steps, rates = _series(json_lines.read(metrics), "learning_rate")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if len(steps):
        loss.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
        loss.plot(
            steps, smooth(losses), color="tab:blue", linewidth=1.5, label="training, smoothed"
        )
    if len(at):
        loss.plot(at, validation, "o-", color="tab:orange", markersize=4, label="validation")
    loss.set_ylabel("loss (nats per target)")
    loss.set_title(title)
    loss.grid(alpha=0.3)
    loss.legend()
    rate.plot(rate_steps, rates, color="tab:green", linewidth=1.2)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    return out


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Exponential average over about `share` of the points, `[n] -> [n]`, unbiased at its start."""
    decay = 1.0 - 1.0 / max(share * len(values), 1.0)
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages.append(total / weight)
    return np.array(averages)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], float(row[name])) for row in rows if name in row]
    finite = np.array([pair for pair in pairs if math.isfinite(pair[1])]).reshape(-1, 2)
    return finite[:, 0], finite[:, 1]
