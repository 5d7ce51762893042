"""Learning-rate schedules: pure functions of the step, so a resumed run is exact.

A schedule is made of a factor in [0, 1] times the peak. Every one begins with a linear warm-up,
step / warmup (MiniCPM, section 4), and ends at the floor, which it keeps if the run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from weights import nearest

Array = jax.Array
Schedule = Callable[[Any], Array]
"""`step (int or array) -> float32[]`."""
Shape = Callable[[Array], Array]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over a run; it is a factor on `optimizer.learning_rate`.

    name: constant, cosine, linear, wsd (warm-up, stable, decay) or multi_step.
    warmup: linear warm-up from zero; steps, or a fraction of the run if below 1.
    decay: length of the last phase of wsd; steps, or a fraction of the run if below 1.
    shape: decay of wsd: exponential, linear, one_minus_sqrt or cosine.
    half_life: of exponential decay, in steps or a fraction of the run; None: ends at floor or 1 %.
    floor: the least factor, reached at the end of the decay; 0.1 is a tenth of the peak.
    milestones: where multi_step changes; steps, or fractions of the run if below 1.
    factors: factor on the peak after each milestone of multi_step.
    """

    name: str = "cosine"
    warmup: float = 0.02
    decay: float = 0.1
    shape: str = "exponential"
    half_life: float | None = None
    floor: float = 0.1
    milestones: tuple[float, ...] = (0.8, 0.9)
    factors: tuple[float, ...] = (0.316, 0.1)

    def __post_init__(self) -> None:
        """Refuse names, lengths and floors that no schedule can have."""
        _check_known("schedule.name", self.name, SCHEDULES)
        _check_known("schedule.shape", self.shape, SHAPES)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"schedule.floor is {self.floor}: it is a factor between 0 and 1")
        for field in ("warmup", "decay"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"schedule.{field} is {getattr(self, field)}: it can't be negative"
                )
        if len(self.milestones) != len(self.factors):
            raise ValueError(
                f"schedule.milestones has {len(self.milestones)} entries and schedule.factors has "
                f"{len(self.factors)}: each milestone needs one factor"
            )


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> Schedule:
    """`step -> float32 learning rate`; raises ValueError if the phases don't fit in `steps`."""
    factor = SCHEDULES[config.name](config, steps)
    return lambda step: peak * factor(jnp.asarray(step, jnp.float32))


def duration(value: float, steps: int, field: str) -> int:
    """A length in steps: `value` itself, or that fraction of the run if it is below 1."""
    if value < 1:
        return round(value * steps)
    if value != int(value):
        raise ValueError(f"schedule.{field} is {value}: give whole steps, or a fraction below 1")
    return int(value)


def constant(config: ScheduleConfig, steps: int) -> Schedule:
    """Warm-up, then 1."""
    return _warmed(config, steps, lambda step: jnp.ones_like(step))


def cosine(config: ScheduleConfig, steps: int) -> Schedule:
    """Warm-up, then half a cosine down to the floor at the last step."""
    return _decayed(config, steps, SHAPES["cosine"])


def linear(config: ScheduleConfig, steps: int) -> Schedule:
    """Warm-up, then a straight line down to the floor at the last step."""
    return _decayed(config, steps, SHAPES["linear"])


def wsd(config: ScheduleConfig, steps: int) -> Schedule:
    """Warm-up, stable at 1, then a decay over the last `decay` steps (MiniCPM, arXiv 2404.06395,
    section 4.2).

    f(x) over the decay's share x in [0, 1]: 0.5 ** (x decay / half_life), 1 - x, 1 - sqrt(x)
    (Hägele et al., arXiv 2405.18392) or (1 + cos(pi x)) / 2. The exponential stops at the floor;
    the others run from 1 to it.
    """
    warmup, decay = duration(config.warmup, steps, "warmup"), duration(config.decay, steps, "decay")
    if warmup + decay > steps:
        raise ValueError(
            f"schedule: warm-up of {warmup} and decay of {decay} steps don't fit in {steps}; "
            "shorten schedule.warmup or schedule.decay (below 1 they are fractions of the run)"
        )
    if config.shape == "exponential":
        half_life = _half_life(config, decay, steps)
        shape: Shape = lambda x: jnp.maximum(0.5 ** (x * decay / half_life), config.floor)  # noqa: E731
    else:
        shape = _above_floor(SHAPES[config.shape], config.floor)
    return _warmed(config, steps, lambda step: shape(_share(step, steps - decay, steps)))


def multi_step(config: ScheduleConfig, steps: int) -> Schedule:
    """Warm-up, 1, then `factors[i]` from `milestones[i]` on (DeepSeek LLM, arXiv 2401.02954)."""
    warmup = duration(config.warmup, steps, "warmup")
    milestones = [duration(value, steps, "milestones") for value in config.milestones]
    if any(b <= a for a, b in zip([warmup, *milestones], [*milestones, steps + 1], strict=True)):
        raise ValueError(
            f"schedule.milestones fall on steps {milestones} of a run of {steps} with a warm-up of "
            f"{warmup}; they must increase, after the warm-up and within the run"
        )

    def factor(step: Array) -> Array:
        value = jnp.ones_like(step)
        for milestone, after in zip(milestones, config.factors, strict=True):
            value = jnp.where(step >= milestone, after, value)
        return value

    return _warmed(config, steps, factor)


SCHEDULES: dict[str, Callable[[ScheduleConfig, int], Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "multi_step": multi_step,
}
"""Schedule name -> `(config, steps) -> (float32 step -> factor in [0, 1])`."""

SHAPES: dict[str, Shape] = {
    "exponential": lambda x: 0.5**x,
    "linear": lambda x: 1 - x,
    "one_minus_sqrt": lambda x: 1 - jnp.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + jnp.cos(math.pi * x)),
}
"""Shape over the share x in [0, 1] of the decay that has passed (exponential: see `wsd`)."""


def _warmed(config: ScheduleConfig, steps: int, after: Schedule) -> Schedule:
    """`step / warmup` before the warm-up's end, `after` from there."""
    warmup = duration(config.warmup, steps, "warmup")
    if warmup > steps:
        raise ValueError(
            f"schedule: warm-up of {warmup} steps is longer than the run of {steps}; shorten "
            "schedule.warmup (below 1 it is a fraction of the run)"
        )
    return lambda step: jnp.where(step < warmup, step / max(warmup, 1), after(step))


def _decayed(config: ScheduleConfig, steps: int, shape: Shape) -> Schedule:
    """Warm-up, then `shape` from its end to the last step."""
    warmup = duration(config.warmup, steps, "warmup")
    lifted = _above_floor(shape, config.floor)
    return _warmed(config, steps, lambda step: lifted(_share(step, warmup, steps)))


def _above_floor(shape: Shape, floor: float) -> Shape:
    return lambda x: floor + (1 - floor) * shape(x)


def _share(step: Array, start: int, stop: int) -> Array:
    """The share of `[start, stop]` that has passed, in [0, 1]."""
    return jnp.clip((step - start) / max(stop - start, 1), 0, 1)


def _half_life(config: ScheduleConfig, decay: int, steps: int) -> float:
    if config.half_life is None:
        return max(decay, 1) / -math.log2(min(max(config.floor, 0.01), 0.999))
    if config.half_life <= 0:
        raise ValueError(f"schedule.half_life is {config.half_life}: it must be above 0")
    return config.half_life if config.half_life >= 1 else config.half_life * steps


def _check_known(field: str, name: str, known: dict) -> None:
    if name not in known:
        hint = nearest(name, known) or ", ".join(known)
        raise ValueError(f"{field} is {name!r}, which is unknown; nearest: {hint}")
