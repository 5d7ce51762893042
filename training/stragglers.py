"""Which process is slower than the others.

All processes wait for the slowest in each step, so their step times are equal and say nothing. What
differs is the time in which a process is busy by itself (data, Python, saving), and the time that
its devices take for a computation of their own.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

TOLERANCE = 0.1
"""Share above the median at which a process or device counts as slow (MegaScale: about 10 %)."""


@dataclasses.dataclass
class StepTimes:
    """The last step times of this process: seconds of whole steps, and of what it did by itself."""

    window: int = 50

    def __post_init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=self.window)
        self.busy: deque[float] = deque(maxlen=self.window)

    def add(self, step_seconds: float, waiting_seconds: float) -> None:
        """A step that took so long, of which so long was spent waiting for the devices."""
        self.steps.append(step_seconds)
        self.busy.append(max(step_seconds - waiting_seconds, 0.0))

    def summary(self, probe: float = 0.0) -> np.ndarray:
        """`float32[3]`: median step, median busy time and the probe, in seconds."""
        middle = [median(times or [0.0]) for times in (self.steps, self.busy)]
        return np.array([*middle, probe], np.float32)


def gather(summary: np.ndarray) -> np.ndarray:
    """The summaries of all processes, `float32[processes, 3]`; all must call this together."""
    if jax.process_count() == 1:
        return summary[None]
    return np.asarray(multihost_utils.process_allgather(summary)).reshape(-1, summary.size)


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A process that holds the others up, and whether by its "host" or its "device"."""

    process: int
    part: str
    seconds: float
    median_seconds: float

    def __str__(self) -> str:
        what = "is busy" if self.part == "host" else "needs for a test product"
        return (
            f"process {self.process} is slow: its {self.part} {what} {self.seconds * 1e3:.1f} ms, "
            f"the median is {self.median_seconds * 1e3:.1f} ms"
        )


def stragglers(gathered: np.ndarray, tolerance: float = TOLERANCE) -> list[Straggler]:
    """Processes above the median of the others by `tolerance`, from what `gather` gave.

    A host is slow if its busy time exceeds the median by that share of a step, a device if its
    probe exceeds the median by that share of itself.
    """
    step = float(np.median(gathered[:, 0]))
    found = []
    for column, part in ((1, "host"), (2, "device")):
        middle = float(np.median(gathered[:, column]))
        allowed = tolerance * (step if part == "host" else middle)
        for process, seconds in enumerate(gathered[:, column].tolist()):
            if len(gathered) > 1 and seconds - middle > allowed:
                found.append(Straggler(process, part, seconds, middle))
    return found


def report(gathered: np.ndarray) -> str:
    """A table of all processes and the stragglers among them."""
    rows = [
        f"{process:7d}  {step * 1e3:8.1f}  {busy * 1e3:8.1f}  {probe * 1e3:9.2f}"
        for process, (step, busy, probe) in enumerate(gathered.tolist())
    ]
    slow = [str(straggler) for straggler in stragglers(gathered)] or ["no process is slow"]
    return "\n".join(["process   step ms   busy ms   probe ms", *rows, *slow])


def probe_seconds(size: int = 1024, repeats: int = 3) -> float:
    """Seconds of a float32 product `[size, size]^2` on the slowest of this process's devices.

    The least of some repetitions, so that one interruption does not make a device look slow.
    """
    slowest = 0.0
    product = jax.jit(lambda x: x @ x)
    for device in jax.local_devices():
        x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
        product(x).block_until_ready()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(x).block_until_ready()
            times.append(time.perf_counter() - start)
        slowest = max(slowest, min(times))
    return slowest
