"""Checkpoints of a run: saved in the background, kept by policy, restored to the bit on any mesh.

`save` blocks only while arrays go from the device to host memory; a thread writes them, adds the
small files, flushes, and renames the folder into place (`model.checkpoint_folder`). Every process
calls every method in the same order; process 0 alone touches the small files and the names. All
processes must see the same file system.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from model import checkpoint_arrays as arrays
from model import checkpoint_folder as folders
from model.checkpoint import check_config, on_first_process, remove_partial, write_description
from model.checkpoint_folder import CheckpointError
from model.config import ModelConfig
from training.retention import kept


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run's state is saved and which checkpoints are kept.

    every: steps between two checkpoints; 0 saves only when the run ends or is interrupted.
    keep_last: newest checkpoints that are kept.
    keep_every: checkpoints at multiples of this step are kept for good; 0 is no such rule.
    keep_best: best checkpoints by best_metric that are kept besides; 0 is no such rule.
    best_metric: the metric that makes a checkpoint the best.
    best_is_largest: the best checkpoint has the largest metric, not the smallest.
    asynchronous: write to the disk while training goes on.
    checksums: record a checksum of every file and verify it before a checkpoint is used.
    timeout_seconds: longest time that one save may take before it counts as failed.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "validation_loss"
    best_is_largest: bool = False
    asynchronous: bool = True
    checksums: bool = True
    timeout_seconds: int = 1200

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep_last", 1), ("keep_every", 0), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"checkpoint.{name}={getattr(self, name)} must be at least {least}"
                )
        if self.timeout_seconds < 1:
            raise ValueError(f"checkpoint.timeout_seconds={self.timeout_seconds} must be positive")


class Checkpoints:
    """The checkpoints of one run, which this process (or group of processes) owns."""

    def __init__(self, folder: str | Path, config: CheckpointConfig | None = None) -> None:
        """`folder` is `RUN/checkpoints`; what a killed save left in it is finished or deleted."""
        self.folder = Path(folder).absolute()
        self.config = config or CheckpointConfig()
        on_first_process(self._prepare)
        self._writer = ocp.AsyncCheckpointer(
            arrays.handler(folders.PARAMS, folders.TRAIN_STATE),
            timeout_secs=self.config.timeout_seconds,
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saving: int | None = None
        self._verified: set[int] = set()

    def save(
        self,
        step: int,
        state: Any,
        config: ModelConfig | None,
        files: Mapping[str, bytes | str] | None = None,
        cursor: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Start saving a state after `step` updates; a checkpoint of that step is replaced.

        `state` is a mapping or dataclass pytree with `params`; everything else in it goes to
        `train_state/`. It may be donated as soon as this returns. `cursor` is any JSON that
        resuming needs. Waits for the save before it, and raises `CheckpointError` if that one
        failed.
        """
        self.wait()
        params, rest = split(state)
        items = {folders.PARAMS: arrays.by_path(params), folders.TRAIN_STATE: rest}
        partial = self._partial(step)
        self._saving = step
        self._verified.discard(step)
        description = jax.tree.map(_shape_only, params)

        def finish() -> None:
            """Runs in the background on process 0, once every process has written its arrays."""
            write_description(partial, config, description, files or {}, provenance or {})
            where = {"step": step, "cursor": dict(cursor or {}), "metrics": _finite(metrics or {})}
            folders.write_json(partial / folders.CURSOR, where)
            folders.commit(partial, self.config.checksums)
            self._prune()

        try:
            self._writer.save(partial, args=arrays.save_arguments(items))
        except Exception as error:
            remove_partial(partial)
            raise self._failed(step, error) from error
        self._thread = threading.Thread(target=self._commit, args=(finish, partial), name="commit")
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()

    def restore(
        self, step: int | None, abstract_state: Any, config: ModelConfig | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The state of a step (None: the newest good one), and its cursor.

        Arrays take the shapes and shardings of `abstract_state`: mesh and number of processes may
        differ from those that saved. With `config`, a checkpoint of another architecture is an
        error that names the fields. Raises `CheckpointError` if a named step is not whole.
        """
        self.wait()
        step = int(on_first_process(lambda: str(self._whole(step))))
        folder = self.folder / folders.step_name(step)
        if config is not None:
            check_config(folder, config)
        params, rest = split(abstract_state)
        found = {
            f"params/{path}": leaf
            for path, leaf in arrays.restore(
                folder / folders.PARAMS, arrays.by_path(params)
            ).items()
        }
        found |= arrays.restore(folder / folders.TRAIN_STATE, rest)
        paths = arrays.by_path(abstract_state)
        state = jax.tree.unflatten(
            jax.tree.structure(abstract_state), [found[path] for path in paths]
        )
        return state, folders.read_json(folder / folders.CURSOR)["cursor"]

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending, the same on all processes."""
        return json.loads(on_first_process(lambda: json.dumps(folders.steps(self.folder))))

    def good_steps(self) -> list[int]:
        """Steps whose checkpoints have all their files in full size, the same on all processes.

        Waits for the save under way; does not read the files, which `restore` does.
        """
        self.wait()
        return json.loads(on_first_process(lambda: json.dumps(self._complete())))

    def latest_good(self) -> int | None:
        """The newest step whose checkpoint is whole; each one passed over is named in a warning."""
        found = on_first_process(lambda: str(self._newest_good()))
        return None if found == "None" else int(found)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a checkpoint."""
        return folders.read_json(self.folder / folders.step_name(step) / folders.CURSOR)["metrics"]

    def abandon(self, after: int, branch: Path | None = None) -> list[int]:
        """Take checkpoints later than `after` out of the run after a rollback; their steps.

        They move to the folder `branch`, or are deleted if it is None.
        """
        self.wait()
        return json.loads(on_first_process(lambda: json.dumps(self._move(after, branch))))

    def check(self) -> None:
        """Raise `CheckpointError` if the save in the background has failed; never waits."""
        if self._failure is not None and jax.process_count() == 1:
            self.wait()

    def wait(self) -> None:
        """Return when the save under way is complete on all processes, or raise if it failed."""
        if self._thread is None:
            return
        self._thread.join()
        step, self._thread, self._saving = self._saving, None, None
        failure, self._failure = self._failure, None
        failed = [failure is not None]
        if jax.process_count() > 1:
            failed = (
                np.asarray(multihost_utils.process_allgather(np.array(failed))).ravel().tolist()
            )
        if any(failed):
            reason = failure or f"process {failed.index(True)} failed"
            raise self._failed(step, reason) from failure

    def close(self) -> None:
        """Wait for the save under way and end the background threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self.close()

    def _prepare(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.recover(self.folder)
        return ""

    def _partial(self, step: int | None) -> Path:
        return self.folder / (folders.step_name(step or 0) + folders.PARTIAL)

    def _commit(self, finish: Any, partial: Path) -> None:
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                finish()
        except BaseException as error:
            remove_partial(partial)
            self._failure = error

    def _failed(self, step: int | None, reason: Any) -> CheckpointError:
        good = folders.newest_good(self.folder)
        outcome = "has no checkpoint yet" if good is None else f"is resumable from step {good}"
        return CheckpointError(
            f"checkpoint of step {step} in {self.folder} was not written: {reason}; "
            f"the run {outcome}"
        )

    def _complete(self) -> list[int]:
        return [
            step
            for step in folders.steps(self.folder)
            if folders.problem(self.folder / folders.step_name(step), read=False) is None
        ]

    def _newest_good(self) -> int | None:
        step = folders.newest_good(self.folder)
        if step is not None:
            self._verified.add(step)
        return step

    def _whole(self, step: int | None) -> int:
        if step is None:
            step = self._newest_good()
            if step is None:
                raise CheckpointError(
                    f"{self.folder}: no checkpoint is whole (found {folders.steps(self.folder)})"
                )
            return step
        read = step not in self._verified
        text = folders.problem(self.folder / folders.step_name(step), read=read)
        if text is not None:
            raise CheckpointError(
                f"checkpoint of step {step} in {self.folder} cannot be used: {text}; "
                f"steps there: {folders.steps(self.folder)}"
            )
        return step

    def _prune(self) -> None:
        """Delete what no policy keeps; only ever called once a newer checkpoint is committed."""
        good = {step: self._metrics_if_readable(step) for step in self._complete()}
        rules = self.config
        keep = kept(
            good,
            rules.keep_last,
            rules.keep_every,
            rules.keep_best,
            rules.best_metric,
            rules.best_is_largest,
        )
        for step in set(good) - keep:
            folders.discard(self.folder / folders.step_name(step))

    def _metrics_if_readable(self, step: int) -> dict[str, float]:
        try:
            return self.metrics(step)
        except (CheckpointError, KeyError, TypeError):
            return {}

    def _move(self, after: int, branch: Path | None) -> list[int]:
        later = [step for step in folders.steps(self.folder) if step > after]
        for step in later:
            source = self.folder / folders.step_name(step)
            if branch is None:
                folders.discard(source)
            else:
                branch.mkdir(parents=True, exist_ok=True)
                shutil.move(source, branch / source.name)
        return later


def split(state: Any) -> tuple[Any, dict[str, Any]]:
    """A state's params, and `{path: leaf}` of everything else."""
    params = state["params"] if isinstance(state, Mapping) else state.params
    rest = arrays.by_path(state)
    return params, {path: leaf for path, leaf in rest.items() if path.split("/")[0] != "params"}


def _shape_only(leaf: Any) -> Any:
    """What `model.json` needs of an array, so that the background thread holds no device memory."""
    return jax.ShapeDtypeStruct(np.shape(leaf), arrays.dtype_of(leaf))


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
