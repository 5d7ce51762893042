"""How fast a run is: FLOPs of a token, MFU where the device's peak is known, and the time that is
left.

FLOPs follow the usual count: 6 per parameter that multiplies and token (forward and backward; of a
mixture's experts, those that a token is sent to), plus attention's 12 x layers x num_heads x
head_dim x mean context, the context counted causally, (length + 1) / 2, or the window.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from statistics import median

import jax

from model import ModelConfig, count_parameters

PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 FLOP/s by `jax.Device.device_kind`, from the vendors' pages."""


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Training FLOPs (forward and backward, no recomputation) of one token in a sequence of
    `length`.
    """
    matrices = count_parameters(config, active=True)
    if not config.tied_embeddings:
        matrices -= config.vocab_size * config.d_model  # an embedding that is no head is a lookup
    attention = 0.0
    for segment in config.segments:
        layer = segment.layer
        context = min((length + 1) / 2, layer.sliding_window or length)
        attention += 12 * len(segment) * layer.num_heads * (layer.head_dim or 0) * context
    return 6.0 * matrices + attention


def model_flops_utilization(
    tokens_per_second: float, flops_token: float, devices: int
) -> float | None:
    """MFU of a run, in [0, 1]; None where the device's peak is not in `PEAK_FLOPS`."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else tokens_per_second * flops_token / (peak * devices)


@dataclasses.dataclass
class Clock:
    """Step times of a run, with what is no step (compilation, evaluation, saving) kept apart."""

    window: int = 50

    def __post_init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=self.window)
        self.evaluations: deque[float] = deque(maxlen=self.window)
        self.first_step_seconds: float | None = None
        self._mark = time.perf_counter()

    def mark(self) -> None:
        """What follows is a step."""
        self._mark = time.perf_counter()

    def step(self) -> float:
        """A step has ended: its seconds since the last mark or step. The first one holds the
        compilation.
        """
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        if self.first_step_seconds is None:
            self.first_step_seconds = seconds
        else:
            self.steps.append(seconds)
        return seconds

    def evaluation(self, seconds: float) -> None:
        """An evaluation took this long."""
        self.evaluations.append(seconds)

    def step_seconds(self) -> float | None:
        """Median seconds of a step, compilation not counted; None before the second step."""
        return median(self.steps) if self.steps else None

    def seconds_left(self, steps: int, evaluations: int) -> float | None:
        """Time left for so many steps and evaluations; None while nothing has been measured."""
        step = self.step_seconds()
        if step is None:
            return None
        mean = sum(self.steps) / len(self.steps)
        evaluation = sum(self.evaluations) / len(self.evaluations) if self.evaluations else 0.0
        return steps * min(mean, 2 * step) + evaluations * evaluation
