"""What a run trains, as functions: the loop knows nothing else of it.

A new kind of run is three functions, `batch(step)`, `loss(apply, params, batch, rng)` and
`predict(apply, params, batch, rng)`, with the model's own `init` and `apply`: `from_functions`.
`training.language_model` makes the task of a language model from a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from model import ModelConfig
from sharding import Rule
from training.objectives import Apply, Metrics, Objective, three_functions
from training.staged import Staged
from training.state import TrainState

Array = jax.Array
Batch = Mapping[str, Any]
Skips = tuple[tuple[int, int], ...]


class Stream(Protocol):
    """Batches by number: a pure function of the step, whose only state is the next step."""

    def batch_at(self, step: int, rows: Any = None) -> Batch:
        """The batch of a step, or its `rows` (row numbers), on any host at any time."""
        ...

    def iterate(self, start_step: int = 0, rows: Any = None) -> Iterator[Batch]:
        """The batches of `start_step` and all later ones, possibly made ahead."""
        ...

    def with_skips(self, skips: Skips) -> Stream:
        """The same stream, never to use these ranges `[start, stop)` of batches."""
        ...

    def batch_index(self, step: int) -> int:
        """Which batch a step uses: the step plus the batches skipped before it."""
        ...


@dataclasses.dataclass(frozen=True)
class FunctionStream:
    """A stream of `function(index) -> batch` with arrays `[batch, ...]`."""

    function: Callable[[int], Batch]
    skips: Skips = ()

    def batch_at(self, step: int, rows: Any = None) -> Batch:
        """The batch of a step, or its rows."""
        batch = self.function(self.batch_index(step))
        return batch if rows is None else {name: array[rows] for name, array in batch.items()}

    def iterate(self, start_step: int = 0, rows: Any = None) -> Iterator[Batch]:
        """Batches one by one, each made when it is asked for."""
        step = start_step
        while True:
            yield self.batch_at(step, rows)
            step += 1

    def with_skips(self, skips: Skips) -> FunctionStream:
        """The same function without these batches."""
        return dataclasses.replace(self, skips=tuple(skips))

    def batch_index(self, step: int) -> int:
        """Which batch a step uses."""
        for start, stop in self.skips:
            if step >= start:
                step += stop - start
        return step


def batch_first(name: str, array: np.ndarray) -> tuple[str | None, ...]:
    """Logical axes of a batch's array: its first axis runs over the batch."""
    return ("batch",) + (None,) * (array.ndim - 1)


def tokens_by_length(name: str, array: np.ndarray) -> tuple[str | None, ...]:
    """Logical axes of a language model's batch: `[batch, length]`, or `[batch]`."""
    return ("batch", "length")[: array.ndim]


def same_manifest(recorded: Any, now: Any, step: int) -> None:
    """Raise `ValueError` unless both manifests are equal."""
    if recorded != now:
        raise ValueError(f"it was {recorded!r}, it is {now!r}")


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions and facts of a run.

    init: `key -> params`; compiled with the params' shardings, never run on one device.
    apply: `(params, batch, rng) -> (outputs, aux)`.
    staged: the same in parts, which pipeline stages need; None runs on none.
    objective: loss, weight, and gradients or predict where they are the method's own.
    stream: training batches.
    validation: makes an iterator of validation batches (rows of this host), or None.
    rules: partition rules of the params; None derives them.
    frozen: references or teachers that the loss gets beside the params; they never change.
    phases: `(step, state) -> state`, applied in order before the step that follows `step` updates
        (pruning, regrowth, clustering); pure, so that a resumed run is exact.
    batch_axes: `(name, array) -> logical axes` of a batch's arrays.
    batch_size: rows of a batch over all hosts.
    derived: `metrics -> more metrics` of an evaluation, such as bits per byte.
    unit: what the objective's weight counts, as the progress line names it.
    flops_per_token: training FLOPs of one target, for MFU; 0 if not known.
    model: written into checkpoints, so that serving can read them; None for other models.
    files: tokenizer files and the like that travel in every checkpoint.
    manifest: what the batches are made of, for the record.
    check_data: `(recorded manifest, manifest now, step)`; `ValueError` if the run cannot go on.
    """

    init: Callable[[Array], Any]
    apply: Apply
    objective: Objective
    stream: Stream
    batch_size: int
    validation: Callable[[Any], Iterable[Batch]] | None = None
    rules: tuple[Rule, ...] | None = None
    frozen: Any = None
    phases: tuple[Callable[[int, TrainState], TrainState], ...] = ()
    batch_axes: Callable[[str, np.ndarray], tuple[str | None, ...]] = batch_first
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda metrics: {}
    unit: str = "rows"
    flops_per_token: float = 0.0
    model: ModelConfig | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check_data: Callable[[Any, Any, int], None] = same_manifest
    staged: Staged | None = None


def from_functions(
    init: Callable[[Array], Any],
    apply: Apply,
    batch: Callable[[int], Batch],
    loss: Callable[..., tuple[Array, Metrics]],
    predict: Callable[[Apply, Any, Batch, Array], Any] | None = None,
    *,
    validation: Callable[[], Iterable[Batch]] | None = None,
    rules: tuple[Rule, ...] | None = None,
    frozen: Any = None,
    phases: tuple[Callable[[int, TrainState], TrainState], ...] = (),
) -> Task:
    """A run of one's own: `batch(step)` makes arrays `[batch, ...]`, `loss` gives a scalar mean.

    Where the run has `frozen` references, `loss` gets them too, as `frozen=`.
    Raises `ValueError` if the batch is empty or its arrays have different numbers of rows.
    """
    rows = {name: np.shape(array)[:1] for name, array in batch(0).items()}
    if not rows or len(set(rows.values())) != 1 or () in rows.values():
        raise ValueError(f"batch(0) must hold arrays with the same first axis; it has {rows}")

    def local(rows: Any) -> Iterable[Batch]:
        assert validation is not None
        return (
            one if rows is None else {name: array[rows] for name, array in one.items()}
            for one in validation()
        )

    return Task(
        init=init,
        apply=apply,
        objective=three_functions(batch=lambda rows: rows, loss=loss, predict=predict),
        stream=FunctionStream(batch),
        batch_size=next(iter(rows.values()))[0],
        validation=None if validation is None else local,
        rules=rules,
        frozen=frozen,
        phases=phases,
    )


def predict(task: Task, params: Any, batch: Batch, rng: Array | None = None) -> Any:
    """The task's predictions for a batch, compiled. Raises `ValueError` if it has no `predict`."""
    function = task.objective.predict
    if function is None:
        raise ValueError("this task has no predict function; give one to from_functions")
    return jax.jit(lambda params, batch, rng: function(task.apply, params, batch, rng))(
        params, dict(batch), jax.random.key(0) if rng is None else rng
    )
