"""The training loop: batches in, steps, evaluations, checkpoints and faults, whatever is trained.

One step is always on its way while the host reads the metrics of the one before, so the device
never waits for the record. What a fault is and what to do about it is decided in `training.faults`;
here it is carried out. `step` is the number of updates done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from model.provenance import provenance
from sharding import Layout, rules_table
from training import json_lines
from training.checkpoints import Checkpoints
from training.config import RunConfig, config_dict
from training.deferral import DeferredStream
from training.errors import RunError
from training.evaluation import evaluate
from training.faults import Action, SpikeDetector, decide
from training.heartbeat import Heartbeat
from training.profiler import Profiler
from training.progress import RunProgress, count
from training.record import Record, combine
from training.setup import Functions, prepare, run_layout
from training.signals import GracefulStop
from training.state import TrainState
from training.stragglers import StepTimes, gather, stragglers
from training.task import Batch, Stream, Task
from training.throughput import Clock, model_flops_utilization
from training.timeline import Timeline
from training.watchdog import Watchdog

STRAGGLER_STEPS = 8
"""Steps that must have been timed before a process is called slow."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its state, the last evaluation, and whether all steps were done."""

    state: TrainState
    step: int
    finished: bool
    workdir: Path
    evaluation: Mapping[str, float]
    reason: str = ""

    @property
    def exit_status(self) -> int:
        """0 for a finished run, 3 for one that stopped early and can be resumed."""
        return 0 if self.finished else 3


@dataclasses.dataclass
class _Sent:
    """A step on its way: what will be recorded once its metrics are there."""

    step: int
    metrics: Mapping[str, jax.Array]
    hash: int
    data_seconds: float


def train(
    task: Task,
    config: RunConfig,
    workdir: str | Path,
    *,
    layout: Layout | None = None,
    stop_at: int | None = None,
    quiet: bool = False,
    heartbeat: Heartbeat | None = None,
) -> Result:
    """Train a task in a folder, or go on with the run that stands there.

    `stop_at` saves and ends after that many steps, as an interruption would. A `heartbeat` tells of
    each step from here on. Raises `RunError` if the folder holds something else, if a fault's
    policy says stop, or if nothing can be restored.
    """
    functions = prepare(task, config, layout or run_layout(config))
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(Record(workdir, config_dict(config)))
        checkpoints = stack.enter_context(Checkpoints(record.folder.checkpoints, config.checkpoint))
        watchdog = stack.enter_context(
            Watchdog(
                record.incidents,
                config.faults.watchdog_seconds,
                config.faults.watchdog_long_seconds,
            )
        )
        run = Training(functions, config, record, checkpoints, watchdog)
        if heartbeat is not None:
            heartbeat.follow(lambda: {**watchdog.state(), "span": run.timeline.current})
        run.begin()
        visible = jax.process_index() == 0 and not quiet
        run.progress = stack.enter_context(RunProgress(config.train.steps, run.step, visible))
        run.announce()
        stop = stack.enter_context(GracefulStop())
        try:
            run.until(min(stop_at or config.train.steps, config.train.steps), stop)
        finally:
            run.close()
        return run.finish(stop.reason or ("" if stop_at is None else f"stop_at={stop_at}"))


class Training:
    """A run under way: all that changes between steps, and the acts of which a run is made."""

    def __init__(
        self,
        functions: Functions,
        config: RunConfig,
        record: Record,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
    ) -> None:
        self.functions, self.config, self.task = functions, config, functions.task
        self.record, self.checkpoints, self.watchdog = record, checkpoints, watchdog
        self.progress = RunProgress(config.train.steps, visible=False)
        self.clock, self.times = Clock(), StepTimes()
        self.timeline = Timeline(record.folder.timeline, config.train.timeline_every)
        self.profiler = Profiler(record.folder.root / "profile", config.train)
        self.detector = SpikeDetector.from_config(config.faults)
        self.evaluation: dict[str, float] = {}
        self.step = self.saved = self.evaluated = 0
        self.state: TrainState
        self._waited_before = 0.0
        self._sent: _Sent | None = None
        self._batches: Iterator[Batch] | None = None

    def begin(self) -> None:
        """Make the state, or restore the newest good checkpoint; set record and data to it."""
        self.watchdog.beat(0, "restore")
        latest = self.checkpoints.latest_good()
        if latest is None:
            start = self.config.train.start_from
            self.state = self.functions.load(start) if start else self.functions.create()
        else:
            self._restore(latest)
        if self.record.data:
            self._check_data()
        self.record.rewind(self.step)
        self.record.write_data(self.task.manifest)

    def _check_data(self) -> None:
        try:
            self.task.check_data(self.record.data, json_lines.plain(self.task.manifest), self.step)
        except ValueError as error:
            raise RunError(
                f"{self.record.folder.order}: the data has changed since this run began, so its "
                f"order cannot be continued: {error}. Restore it, or choose another --workdir"
            ) from error

    def announce(self) -> None:
        """Say where the run begins, and what was changed since it was last under way."""
        for name, (before, now) in self.record.changed.items():
            self.progress.say(f"changed since the run began: {name} {before!r} -> {now!r}")
        if self.task.rules is None or self.config.sharding.rules == "auto":
            self.progress.say(f"derived sharding rules:\n{rules_table(self.functions.rules)}")
        if self.step >= self.config.train.steps:
            self.progress.say(f"{self.record.folder.root} has done all its {self.step} steps")
        elif self.step:
            self.progress.say(f"resuming {self.record.folder.root} from step {self.step}")
        if self.record.changed or 0 < self.step < self.config.train.steps:
            self._note("restart", step=self.step, changed=self.record.changed)

    def until(self, last: int, stop: GracefulStop) -> None:
        """Take steps up to `last`, or until a signal asks to stop."""
        self.watchdog.beat(self.step, "compile")
        self._mark()
        while self.step < last:
            self._take_step()
            due = self._due(self.config.evaluation.every) or self._due(self.config.checkpoint.every)
            if due or self.step == last:
                self._settle()  # may roll back, so what is due is asked again
                self._evaluate_and_save()
            every_host = jax.process_count() == 1 or self._due(self.config.train.log_every)
            if every_host and self._asked_to_stop(stop):
                break
        self._settle()

    def _evaluate_and_save(self) -> None:
        last = self.config.train.steps
        if self._due(self.config.evaluation.every) and self.evaluated < self.step < last:
            self.evaluate(self.config.evaluation.batches)
        if self._due(self.config.checkpoint.every) and self.saved != self.step:
            self.save()

    def finish(self, reason: str) -> Result:
        """Save the last step, evaluate if the run is complete, draw the plot."""
        total = self.config.train.steps
        finished = self.step >= total
        if finished:
            self.evaluation = self._recorded_evaluation()
            if not self.evaluation:
                self.evaluate(self.config.evaluation.final_batches)
        if self.saved != self.step:
            self.save()
        self.watchdog.beat(self.step, "checkpoint")
        self.checkpoints.wait()
        self.record.plot()
        if not finished:
            self._note("interrupted", step=self.step, reason=reason)
            self.progress.say(
                f"stopped: {reason}; saved step {self.step} of {total} in "
                f"{self.record.folder.root}; the same command resumes it"
            )
        root = self.record.folder.root
        return Result(self.state, self.step, finished, root, self.evaluation, reason)

    def close(self) -> None:
        """Stop what runs beside the steps."""
        self.profiler.close()
        self.timeline.write()
        self._close_batches()

    def evaluate(self, limit: int) -> None:
        """Validate the parameters (their average too, if one is kept) and record it."""
        if self.task.validation is None:
            return
        self.watchdog.beat(self.step, "evaluation")
        self.timeline.enter("evaluation")
        start = time.perf_counter()
        row = self._evaluate(self.state.params, limit)
        if self.state.ema is not None:
            averaged = self._evaluate(self.functions.averaged(self.state), limit)
            row |= {f"ema_{name}": value for name, value in averaged.items() if name != "tokens"}
        self.evaluation, self.evaluated = row, self.step
        self.record.evaluation(self.step, row)
        names = ["loss", *(name for name in row if name not in ("loss", "log_z", "tokens"))]
        shown = "  ".join(f"{name} {row[name]:.4f}" for name in names)
        self.progress.say(f"step {self.step}  validation: {shown}")
        self.clock.evaluation(time.perf_counter() - start)
        self._back_to_steps()

    def save(self) -> None:
        """Start saving the state in the background; blocks while it is copied to the host."""
        self.watchdog.beat(self.step, "checkpoint")
        self.timeline.enter("checkpoint")
        metrics = {f"validation_{name}": value for name, value in self.evaluation.items()}
        self.checkpoints.save(
            self.step,
            self.state,
            self.task.model,
            self.task.files,
            {"step": self.step, "detector": self.detector.state()},
            metrics,
            provenance(
                "train",
                {"run": str(self.record.folder.root), "step": self.step},
                [self.config.train.start_from] if self.config.train.start_from else [],
            ),
        )
        self.saved = self.step
        self._back_to_steps()

    def _take_step(self) -> None:
        self.profiler.step(self.step)
        start = time.perf_counter()
        batch = next(self._open_batches())
        data_seconds = time.perf_counter() - start
        self.timeline.enter("host")
        hashed = self.functions.hash(batch)
        for phase in self.task.phases:
            self.state = phase(self.step, self.state)
        placed = self.functions.put(batch)
        self.timeline.enter("dispatch" if self.clock.first_step_seconds else "compile")
        self.state, metrics = self.functions.step(self.state, placed, self.task.frozen)
        self.step += 1
        sent, self._sent = self._sent, _Sent(self.step, metrics, hashed, data_seconds)
        if sent is not None:
            self._receive(sent)

    def _settle(self) -> None:
        """Wait for the step on its way."""
        sent, self._sent = self._sent, None
        if sent is not None:
            self._receive(sent)

    def _receive(self, sent: _Sent) -> None:
        """Record a step that has ended, look for faults, and act on them."""
        self.timeline.enter("wait")
        values = {name: float(value) for name, value in jax.device_get(sent.metrics).items()}
        self.timeline.enter("record")
        seconds, waited = self.clock.step(), self.timeline.waited - self._waited_before
        self._waited_before = self.timeline.waited
        if self.clock.step_seconds() is not None:  # the first step is compilation
            self.times.add(seconds, waited)
        self.watchdog.beat(sent.step)
        tokens_per_second = values["tokens"] / seconds
        speed = {
            "step_seconds": seconds,
            "data_seconds": sent.data_seconds,
            "tokens_per_second": tokens_per_second,
        }
        self.record.metrics(sent.step, values | speed, self._combined(sent.step, sent.hash))
        self._show(sent.step, values)
        if sent.step % self.config.train.log_every == 0:
            self._look_for_stragglers(sent.step)
        self.checkpoints.check()
        self._act(sent.step, values)
        self.timeline.step(sent.step)

    def _act(self, step: int, values: Mapping[str, float]) -> None:
        if values.get("spike"):
            self._note("spike", action="skip", outcome="skipped", onset=step, loss=values["loss"])
        incident = self.detector.update(step, values["loss"], values["grad_norm"])
        if incident is None:
            return
        action = decide(
            incident,
            self.config.faults,
            [saved for saved in self.checkpoints.good_steps() if saved <= step],
            self.record.rollbacks,
            self._stream().batch_index,
        )
        facts = {k: v for k, v in dataclasses.asdict(incident).items() if k != "kind"}
        self._note(incident.kind, action=action.kind, **facts)
        self.progress.say(f"step {step}: {action.reason}")
        if action.kind == "stop":
            self._sent = None
            raise RunError(f"{action.reason}; {self.record.folder.incidents} holds the incident")
        if action.kind == "rollback":
            self._roll_back(action, step, values["loss"])

    def _roll_back(self, action: Action, step: int, loss: float) -> None:
        assert action.to_step is not None
        assert action.batches is not None
        self._sent = None
        self.checkpoints.wait()
        branch = f"{step:08d}" if self.config.faults.keep_branches else ""
        folder = self.record.folder.branches / branch / "checkpoints" if branch else None
        self.checkpoints.abandon(action.to_step, folder)
        start, stop = action.batches
        again = any(start < last and first < stop for first, last in self.record.deferred)
        defer = action.defer and not again
        self.record.drop(action.batches, defer)
        self._close_batches()
        self._restore(action.to_step)
        self.record.rewind(self.step, branch)
        self._note(
            "rollback",
            step=step,
            to_step=self.step,
            batches=action.batches,
            deferred=defer,
            loss=loss,
        )
        what = "deferred to the end" if defer else "never to be used again"
        self.progress.say(
            f"rolled back to step {self.step}; batches {action.batches[0]} to "
            f"{action.batches[1] - 1} are {what}"
        )
        self._back_to_steps()

    def _restore(self, step: int) -> None:
        self.state, cursor = self.checkpoints.restore(
            step, self.functions.abstract, self.task.model
        )
        self.step = self.saved = self.evaluated = int(cursor["step"])
        self.detector = SpikeDetector.from_config(self.config.faults, cursor["detector"])

    def _recorded_evaluation(self) -> dict[str, float]:
        """The evaluation of this step, if there is one: a finished run repeats nothing."""
        rows = json_lines.read(self.record.folder.evaluations)
        row = next((row for row in reversed(rows) if row["step"] == self.step), {})
        return {name: float(value) for name, value in row.items() if name not in ("step", "time")}

    def _evaluate(self, params: Any, limit: int) -> dict[str, float]:
        assert self.task.validation is not None
        batches = self.task.validation(self.functions.rows)
        metrics = evaluate(
            self.functions.evaluation_step,
            params,
            batches,
            limit=limit or None,
            frozen=self.task.frozen,
            put=self.functions.put,
        )
        return metrics | dict(self.task.derived(metrics))

    def _stream(self) -> Stream:
        skips, deferred = self.record.skips, self.record.deferred
        if deferred:
            return DeferredStream(self.task.stream, deferred, self.config.train.steps, skips)
        return self.task.stream.with_skips(skips)

    def _open_batches(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = iter(self._stream().iterate(self.step, self.functions.rows))
        return self._batches

    def _close_batches(self) -> None:
        if self._batches is not None and hasattr(self._batches, "close"):
            self._batches.close()  # pyright: ignore
        self._batches = None

    def _combined(self, step: int, mine: int) -> str:
        """The hash of the whole batch; with several processes only where they meet anyway."""
        if jax.process_count() == 1:
            return combine([mine])
        if step % self.config.train.log_every:
            return ""
        parts = np.array([mine >> 32, mine & 0xFFFFFFFF], np.uint32)
        self.timeline.enter("gather")
        gathered = np.asarray(multihost_utils.process_allgather(parts)).reshape(-1, 2)
        self.timeline.enter("record")
        return combine([(int(high) << 32) + int(low) for high, low in gathered])

    def _note(self, kind: str, **facts: Any) -> None:
        """Record an incident that all processes see, once."""
        if jax.process_index() == 0:
            self.record.incidents.add(kind, **facts)

    def _asked_to_stop(self, stop: GracefulStop) -> bool:
        before = self.timeline.current
        self.timeline.enter("gather")
        asked = stop.anywhere()
        self.timeline.enter(before)
        return asked

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _back_to_steps(self) -> None:
        self.watchdog.beat(self.step)
        self._mark()

    def _mark(self) -> None:
        """What follows counts as steps."""
        self.timeline.enter("data")
        self._waited_before = self.timeline.waited
        self.clock.mark()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        seconds = self.clock.step_seconds()
        text = f"loss {values['loss']:.4f}"
        if seconds is not None:
            speed = values["tokens"] / seconds
            text += f"  {count(speed)} {self.task.unit}/s"
            devices = self.functions.layout.mesh.size
            mfu = model_flops_utilization(speed, self.task.flops_per_token, devices)
            text += f"  MFU {mfu:.1%}" if mfu else ""
        left = self.config.train.steps - step
        every = self.config.evaluation.every
        evaluations = 1 + (left // every if every else 0)
        self.progress.update(step, text, self.clock.seconds_left(left, evaluations))

    def _look_for_stragglers(self, step: int) -> None:
        if jax.process_count() == 1 or len(self.times.steps) < STRAGGLER_STEPS:
            return
        self.timeline.enter("gather")
        gathered = gather(self.times.summary())
        self.timeline.enter("record")
        for slow in stragglers(gathered):
            facts = dataclasses.asdict(slow)
            self._note("straggler", step=step, slow_process=facts.pop("process"), **facts)
            self.progress.say(f"step {step}: {slow}")
