"""Which checkpoints of a run are kept: the last few, every n-th step, the best few by a metric."""

from __future__ import annotations

from collections.abc import Mapping


def kept(
    steps: Mapping[int, Mapping[str, float]],
    keep_last: int,
    keep_every: int = 0,
    keep_best: int = 0,
    metric: str = "",
    largest: bool = False,
) -> set[int]:
    """Steps to keep out of `{step: metrics}` of good checkpoints; the newest is always among them.

    A checkpoint without the metric, or with one that is not a number, is no candidate for the best.
    """
    ordered = sorted(steps)
    last = set(ordered[-max(keep_last, 1) :])
    every = {step for step in ordered if keep_every and step % keep_every == 0}
    sign = -1.0 if largest else 1.0
    scored = [(sign * steps[step][metric], step) for step in ordered if metric in steps[step]]
    best = sorted(pair for pair in scored if pair[0] == pair[0])[:keep_best]
    return last | every | {step for _, step in best}
