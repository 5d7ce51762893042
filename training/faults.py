"""Which steps of a run are faults, and what to do about them.

`SpikeDetector` watches the loss, `decide` turns what it reports into an action; both are plain
functions of their inputs, so every process of a run comes to the same decision, and a resumed run
to the same as one that never stopped. The loop carries the action out.

Everywhere here `step` is the number of updates done, the one it speaks of included: the first row
of a run is step 1, it read batch `batch_index(0)`, and the checkpoint of step s holds updates 1 to
s.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

NONFINITE = ("skip", "rollback", "stop")
SPIKE_ACTIONS = ("alert", "skip", "rollback", "defer", "stop")
LEAST_WINDOW = 32
"""Losses that must have been seen before a spike can be told from noise."""


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """What happens on non-finite values, loss spikes and hangs.

    nonfinite: on a non-finite loss or gradient: "skip" the update, "rollback" or "stop".
    max_skips: updates skipped in a row before "skip" becomes "rollback".
    spike_action: on a malignant spike: "alert", "rollback", "defer" (its data to the end), "stop";
        "skip" refuses each update whose loss is a spike, and rolls back if that does not end it.
    window: steps whose median and spread a loss is measured against.
    z: robust standard deviations above the median that make a spike.
    confirm: steps in a row that open a spike, and that close it.
    patience: steps after which a spike that has not closed is malignant.
    margin: steps before the onset whose data counts as part of the cause.
    max_rollbacks: rollbacks in a run before the next one stops it.
    keep_branches: what a rollback undoes is kept under branches/, not deleted.
    watchdog_seconds: time without a step before a hang is reported; at least 10 median steps.
    watchdog_long_seconds: the same while compiling, restoring, evaluating or saving.
    """

    nonfinite: str = "skip"
    max_skips: int = 20
    spike_action: str = "alert"
    window: int = 256
    z: float = 6.0
    confirm: int = 3
    patience: int = 100
    margin: int = 8
    max_rollbacks: int = 3
    keep_branches: bool = True
    watchdog_seconds: float = 120.0
    watchdog_long_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name, known in (("nonfinite", NONFINITE), ("spike_action", SPIKE_ACTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"faults.{name}={getattr(self, name)!r}; choose {', '.join(known)}"
                )
        for name, least in (
            ("max_skips", 0),
            ("window", LEAST_WINDOW),
            ("confirm", 1),
            ("patience", self.confirm),
            ("margin", 0),
            ("max_rollbacks", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"faults.{name}={getattr(self, name)} must be at least {least}")
        for name in ("z", "watchdog_seconds", "watchdog_long_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"faults.{name}={getattr(self, name)} must be positive")


@dataclasses.dataclass(frozen=True)
class Incident:
    """A fault that was seen: a row of `incidents.jsonl`.

    kind: "spike" or "nonfinite".
    outcome: of a spike: "open" when it is confirmed, then "benign" or "malignant".
    onset: its first step. detected: the step at which this was reported.
    loss_before: median over the window before the onset. loss: at the step of the report.
    z: robust score at the step of the report. in_a_row: non-finite steps in a row up to this one.
    """

    kind: str
    outcome: str
    onset: int
    detected: int
    loss_before: float
    loss: float
    z: float = math.nan
    in_a_row: int = 0


class SpikeDetector:
    """Robust scores of the loss over a window that leaves spikes out (LLM360 K2, arXiv 2501.07124).

    z = (loss - median) / (1.4826 MAD + 1e-6) over the last `window` losses that were no spike. A
    spike opens after `confirm` steps in a row with z above the threshold, is benign once as many in
    a row are below it, and malignant if that has not happened `patience` steps after its onset; the
    losses of a malignant spike then become the new window, so that watching goes on if it is kept.
    """

    def __init__(
        self, window: int = 256, z: float = 6.0, confirm: int = 3, patience: int = 100
    ) -> None:
        self.window, self.z, self.confirm, self.patience = window, z, confirm, patience
        self._losses: deque[float] = deque(maxlen=window)
        self._high: list[float] = []
        self._onset = 0
        self._calm = 0
        self._open = False
        self._not_finite = 0

    @staticmethod
    def from_config(config: FaultConfig, state: dict[str, Any] | None = None) -> SpikeDetector:
        """A detector with a config's settings, going on from what `state()` gave."""
        detector = SpikeDetector(config.window, config.z, config.confirm, config.patience)
        if state is not None:
            detector._losses.extend(state["losses"])
            detector._high = list(state["high"])
            for name in ("onset", "calm", "open", "not_finite"):
                setattr(detector, f"_{name}", state[name])
        return detector

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as JSON, for a checkpoint's cursor."""
        return {
            "losses": list(self._losses),
            "high": list(self._high),
            "onset": self._onset,
            "calm": self._calm,
            "open": self._open,
            "not_finite": self._not_finite,
        }

    def update(self, step: int, loss: float, grad_norm: float = 0.0) -> Incident | None:
        """What there is to tell after a step's loss (mean over all processes) and gradient norm."""
        loss, grad_norm = float(loss), float(grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._not_finite += 1
            onset = step - self._not_finite + 1
            before = median(self._losses) if self._losses else math.nan
            return Incident("nonfinite", "", onset, step, before, loss, in_a_row=self._not_finite)
        self._not_finite = 0
        score = self.score(loss)
        return self._above(step, loss, score) if score > self.z else self._below(step, loss, score)

    def score(self, loss: float) -> float:
        """The robust z of a loss; 0 until enough steps have been seen."""
        if len(self._losses) < LEAST_WINDOW:
            return 0.0
        middle = median(self._losses)
        spread = median(abs(value - middle) for value in self._losses)
        return (loss - middle) / (1.4826 * spread + 1e-6)

    def _above(self, step: int, loss: float, score: float) -> Incident | None:
        if not self._high:
            self._onset = step
        self._high.append(loss)
        self._calm = 0
        if self._open:
            return self._maybe_malignant(step, loss, score)
        if len(self._high) < self.confirm:
            return None
        self._open = True
        return self._report("open", step, loss, score)

    def _below(self, step: int, loss: float, score: float) -> Incident | None:
        self._losses.append(loss)
        self._calm += 1
        if not self._open:
            self._high = []
            return None
        if self._calm < self.confirm:
            return self._maybe_malignant(step, loss, score)
        incident = self._report("benign", step, loss, score)
        self._close()
        return incident

    def _maybe_malignant(self, step: int, loss: float, score: float) -> Incident | None:
        if step - self._onset < self.patience:
            return None
        incident = self._report("malignant", step, loss, score)
        self._losses = deque(self._high, maxlen=self.window)
        self._close()
        return incident

    def _close(self) -> None:
        self._high, self._calm, self._open = [], 0, False

    def _report(self, outcome: str, step: int, loss: float, score: float) -> Incident:
        return Incident("spike", outcome, self._onset, step, median(self._losses), loss, score)


@dataclasses.dataclass(frozen=True)
class Action:
    """What the loop is to do.

    kind: "continue", "rollback" or "stop".
    reason: one sentence for the log, empty where nothing happened.
    to_step: rollback: the step whose checkpoint is restored.
    batches: rollback: `[start, stop)`, the batches that are not to be used when training goes on.
    defer: rollback: they are used at the end of the run instead of never.
    """

    kind: str
    reason: str = ""
    to_step: int | None = None
    batches: tuple[int, int] | None = None
    defer: bool = False


CONTINUE = Action("continue")


def decide(
    incident: Incident | None,
    config: FaultConfig,
    checkpoints: Sequence[int],
    rollbacks: int,
    batch_index: Callable[[int], int],
) -> Action:
    """The action that a config asks for on an incident.

    `checkpoints` are the steps of good ones, `rollbacks` those that the run has made,
    `batch_index(t)` the batch read after t updates. A rollback goes to the newest checkpoint that
    holds no update from the batches it drops: those from `margin` steps before the onset up to the
    detection.
    """
    if incident is None:
        return CONTINUE
    wish, reason = _wish(incident, config)
    if wish not in ("rollback", "defer"):
        return Action(wish, reason)
    first = max(1, incident.onset - config.margin)
    earlier = [step for step in checkpoints if step < first]
    if rollbacks >= config.max_rollbacks:
        return Action(
            "stop",
            f"{reason}; {rollbacks} rollbacks have not helped (faults.max_rollbacks). Look at the "
            f"data of steps {first} to {incident.detected}, or lower the learning rate",
        )
    if not earlier:
        kind = "continue" if incident.kind == "spike" else "stop"
        advice = f"no checkpoint before step {first} to go back to; save more often"
        return Action(kind, f"{reason}; {advice} (checkpoint.every)")
    batches = (batch_index(first - 1), batch_index(incident.detected - 1) + 1)
    return Action("rollback", reason, max(earlier), batches, defer=wish == "defer")


def _wish(incident: Incident, config: FaultConfig) -> tuple[str, str]:
    """`(action, reason)` by policy alone."""
    if incident.kind == "nonfinite":
        reason = f"loss or gradient not finite at step {incident.detected}"
        if config.nonfinite != "skip":
            return config.nonfinite, reason
        if incident.in_a_row > config.max_skips:
            return "rollback", f"{reason}, the {incident.in_a_row}th in a row"
        return "continue", f"{reason}: update skipped"
    reason = (
        f"{incident.outcome} loss spike since step {incident.onset}: {incident.loss:.4g} "
        f"after {incident.loss_before:.4g} (z {incident.z:.1f})"
    )
    if incident.outcome != "malignant" or config.spike_action == "alert":
        return "continue", reason
    return "rollback" if config.spike_action == "skip" else config.spike_action, reason
