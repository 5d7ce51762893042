"""A profiler trace of a few steps, on demand: `--config.train.profile_start=20`.

The trace is written to `RUN/profile/`, where TensorBoard's profile page and Perfetto read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Starts and ends `jax.profiler`'s trace at the configured steps; does nothing otherwise."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder = folder
        self.start = config.profile_start
        self.stop = config.profile_start + config.profile_steps
        self._running = False

    def step(self, step: int) -> None:
        """Called before the step that follows `step` updates."""
        if self.start < 0:
            return
        if step == self.start and not self._running:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif step >= self.stop:
            self.close()

    def close(self) -> None:
        """End a trace that is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
