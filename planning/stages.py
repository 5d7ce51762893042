"""How many layers each pipeline stage gets where stages are not equally fast (Holmes, arXiv
2312.03549, whose split is given by hand; here it is the exact one).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def split_layers(
    n_layers: int, speeds: Sequence[float], extra: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Layers of each stage, at least one, so that the slowest stage is as fast as can be:
    the minimiser of `max_i (n_i + extra_i) / speeds_i`.

    Each layer in turn goes to the stage that would then need least time, the earlier one of equals.

    Args:
        n_layers: of the model.
        speeds: layers a second of each stage, in any unit; computing alone, no exchanges.
        extra: work that a stage has beside its layers (embedding, head), in layers.

    Raises:
        ValueError: for fewer layers than stages, or speeds that are not above 0.
    """
    extra = [0.0] * len(speeds) if extra is None else list(extra)
    if len(extra) != len(speeds):
        raise ValueError(f"{len(extra)} values of extra work for {len(speeds)} stages")
    for stage, (speed, more) in enumerate(zip(speeds, extra, strict=True)):
        if not (0 < speed < math.inf and 0 <= more < math.inf):
            raise ValueError(
                f"stage {stage}: speed {speed}, extra {more}; give a speed above 0 and extra work "
                "of 0 or more"
            )
    if not 0 < len(speeds) <= n_layers:
        raise ValueError(
            f"{n_layers} layers for {len(speeds)} stages; each stage needs at least one layer"
        )
    layers = [1] * len(speeds)
    waiting = [((2 + extra[i]) / speeds[i], i) for i in range(len(speeds))]
    heapq.heapify(waiting)
    for _ in range(n_layers - len(speeds)):
        _, stage = waiting[0]
        layers[stage] += 1
        heapq.heapreplace(waiting, ((layers[stage] + 1 + extra[stage]) / speeds[stage], stage))
    return tuple(layers)


def slowest(
    layers: Sequence[int], speeds: Sequence[float], extra: Sequence[float] | None = None
) -> float:
    """Time of the slowest stage, in the unit of `split_layers`: what a tick of a pipeline takes."""
    extra = [0.0] * len(speeds) if extra is None else extra
    return max((n + e) / s for n, s, e in zip(layers, speeds, extra, strict=True))
