"""Evaluation: one compiled step, and means over all targets of all batches, the last one too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training.objectives import Apply, Objective
from training.staged import StagedStep, staged_metrics
from training.state import Placement
from training.step import micro_batches

Array = jax.Array
EvaluationStep = Callable[..., dict[str, Array]]


def make_evaluation_step(
    objective: Objective,
    apply: Apply,
    staged: StagedStep | None = None,
    placement: Placement | None = None,
) -> EvaluationStep:
    """Jitted `step(params, batch, frozen=None) -> {metric: sum over targets, "tokens": targets}`.

    With `staged` the batch goes through pipeline stages in as many micro-batches as in training.
    """
    if staged is not None:
        return jax.jit(
            lambda params, batch, frozen=None: staged_metrics(
                staged,
                objective,
                params,
                micro_batches(batch, staged.schedule.micro_batches, placement),
                frozen,
            )
        )

    def still(params: Any, batch: Mapping[str, Any], rng: Array | None) -> Any:
        return apply(params, batch, None)

    def step(params: Any, batch: Mapping[str, Any], frozen: Any = None) -> dict[str, Array]:
        loss, metrics = objective.loss(still, params, batch, jax.random.key(0), frozen=frozen)
        weight = objective.weight(batch)
        sums = {name: weight * value for name, value in {"loss": loss, **metrics}.items()}
        return {**sums, "tokens": weight}

    return jax.jit(step)


def evaluate(
    step: EvaluationStep,
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    limit: int | None = None,
    frozen: Any = None,
    put: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda batch: batch,
) -> dict[str, float]:
    """Means over the targets of at most `limit` batches; `tokens` is the number of targets.

    Batches after the first are padded to its number of rows, so that one compilation serves;
    padding has `loss_mask` 0. `put` places a batch on the devices. Raises ValueError if there is
    not one target.
    """
    sums, rows = [], None
    for batch in islice(batches, limit):
        rows = rows or _rows(batch)
        sums.append(step(params, put(pad_batch(batch, rows)), frozen))
    totals: dict[str, float] = {}
    for one in jax.device_get(sums):
        for name, value in one.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    tokens = totals.pop("tokens", 0.0)
    if not tokens:
        raise ValueError(
            f"nothing to evaluate: {len(sums)} batches with no target whose loss_mask is not 0"
        )
    return {**{name: value / tokens for name, value in totals.items()}, "tokens": tokens}


def pad_batch(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Append rows of zeros up to `rows`; a batch without `loss_mask` stays as it is.

    Raises ValueError if the batch has more rows than that.
    """
    missing = rows - _rows(batch)
    if missing < 0:
        raise ValueError(f"a batch of {_rows(batch)} rows can't be padded to {rows}")
    if not missing or "loss_mask" not in batch:
        return dict(batch)
    return {
        name: np.pad(np.asarray(array), [(0, missing)] + [(0, 0)] * (np.ndim(array) - 1))
        for name, array in batch.items()
    }


def _rows(batch: Mapping[str, Any]) -> int:
    return int(jnp.shape(jax.tree.leaves(dict(batch))[0])[0])
