"""What stands before the first step: mesh, shardings, compiled functions and the state, new or
restored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model import ModelConfig, abstract
from model.checkpoint import load, stored_params
from model.checkpoint_folder import locate
from model.segments import segments_of
from model.staged import only_segment
from sharding import (
    Layout,
    Rule,
    check_layers,
    check_stage_layers,
    cluster_mesh,
    derive_rules,
    global_array,
    make_layout,
    make_mesh,
    override_axes,
    pipeline_schedule,
    rows_of_process,
)
from training.config import RunConfig
from training.errors import RunError
from training.evaluation import EvaluationStep, make_evaluation_step
from training.hierarchical import abstract_feedback, hierarchy
from training.optimizers import make_optimizer
from training.record import batch_hash
from training.schedules import make_schedule
from training.staged import StagedStep
from training.state import Placement, TrainState, abstract_state, init_state, new_state, place
from training.step import Step, make_step
from training.task import Batch, Task
from training.trainable import Predicate, by_patterns, map_leaves, merge, split_trainable
from weights import flatten, is_format, paths

Array = jax.Array


def run_layout(config: RunConfig) -> Layout:
    """The mesh of a config over all devices, with its sharding tables.

    Raises `ValueError` where the mesh does not fit the devices.
    """
    return make_layout(run_mesh(config), config.sharding)


def run_mesh(config: RunConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config over `devices` (default: all), laid over its clusters if it has any."""
    if config.clusters:
        devices = jax.devices() if devices is None else devices
        return cluster_mesh(config.mesh, config.clusters, devices)
    return make_mesh(config.mesh, devices)


@dataclasses.dataclass(frozen=True)
class Functions:
    """The compiled parts of a run and where its arrays live."""

    task: Task
    layout: Layout
    rules: tuple[Rule, ...]
    placement: Placement
    abstract: TrainState
    step: Step
    evaluation_step: EvaluationStep
    create: Callable[[], TrainState]
    load: Callable[[str], TrainState]
    trainable: Predicate
    rows: np.ndarray
    own: np.ndarray

    def hash(self, batch: Batch) -> int:
        """The part of a batch's hash that this process adds: of rows that no process before has."""
        own = {name: np.asarray(array)[self.own] for name, array in batch.items()}
        return batch_hash(own, int(self.rows[self.own][0])) if self.own.any() else 0

    def averaged(self, state: TrainState) -> Any:
        """The averaged parameters, with those that do not train as they are."""
        return merge(state.ema, split_trainable(state.params, self.trainable)[1])

    def put(self, batch: Batch) -> dict[str, Array]:
        """This host's rows of a batch as arrays over the whole mesh."""
        arrays = {name: np.asarray(array) for name, array in batch.items()}
        shardings = {
            name: self.layout.sharding(self.task.batch_axes(name, array))
            for name, array in arrays.items()
        }
        if jax.process_count() == 1:
            return jax.device_put(arrays, shardings)
        return {name: global_array(arrays[name], shardings[name]) for name in arrays}


def prepare(task: Task, config: RunConfig, layout: Layout) -> Functions:
    """Shardings and compiled functions of a run; nothing is allocated yet.

    Raises `ValueError` that names the field where a batch, a rule or a pattern does not fit.
    """
    staged = staged_step(task, config, layout)
    rows_per_device = layout.size("batch") * config.train.accumulation
    if task.batch_size % rows_per_device:
        raise ValueError(
            f"a batch of {task.batch_size} rows does not divide into {layout.size('batch')} devices"
            f" x {config.train.accumulation} micro-batches; use a multiple of {rows_per_device}"
        )
    abstract_params = starting_params(task, config)
    rules = run_rules(task, config, layout, abstract_params)
    trainable = by_patterns((config.train.trainable,), abstract_params, "train.trainable")
    ours, _ = split_trainable(abstract_params, trainable)
    optimizer = make_optimizer(config.optimizer, ours, task.rules or rules)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.train.steps)
    ema = config.train.ema_decay > 0
    key = jax.random.key(config.seed)
    guard = config.faults.spike_action == "skip"
    window = config.faults.window if guard else 0
    collectives = hierarchy(
        layout,
        abstract_params,
        rules,
        trainable,
        formats=task.model is not None,
        again=config.train.remat == "none",
    )
    feedback = abstract_feedback(collectives, abstract_params, trainable)
    abstract = abstract_state(abstract_params, optimizer, trainable, ema, window, feedback)
    placement = place(abstract, rules, layout, trainable)
    by_batch = layout.sharding(("batch",))
    rows = rows_of_process(by_batch, task.batch_size)
    earlier = [
        rows_of_process(by_batch, task.batch_size, process)
        for process in range(jax.process_index())
    ]
    return Functions(
        task=task,
        layout=layout,
        rules=rules,
        placement=placement,
        abstract=placed(abstract, placement.state),
        step=make_step(
            task.objective,
            task.apply,
            optimizer,
            schedule,
            accumulation=config.train.accumulation,
            clip_norm=config.train.clip_norm or None,
            trainable=trainable,
            ema_decay=config.train.ema_decay or None,
            nonfinite="propagate" if config.faults.nonfinite == "stop" else "skip",
            spike_z=config.faults.z if guard else None,
            placement=placement,
            staged=staged,
            hierarchy=collectives,
        ),
        evaluation_step=make_evaluation_step(task.objective, task.apply, staged, placement),
        create=lambda: init_state(
            task.init, optimizer, key, trainable, ema, placement, window, feedback
        ),
        load=lambda folder: _load(
            folder, abstract, optimizer, key, trainable, ema, placement, window
        ),
        trainable=trainable,
        rows=rows,
        own=~np.isin(rows, np.concatenate(earlier) if earlier else []),
    )


def staged_step(task: Task, config: RunConfig, layout: Layout) -> StagedStep | None:
    """How a step goes through the stages of a mesh; None where there is one.

    Raises `ValueError` that names the field if the model cannot be cut so.
    """
    stages = layout.mesh.shape["stage"]
    if stages == 1:
        return None
    if task.staged is None:
        raise ValueError(
            f"mesh.stage={stages}: this task does not give its model in parts (Task.staged), so no "
            "pipeline can run it; use 1, and fsdp or tensor instead"
        )
    pipeline = config.train.pipeline
    if task.model is not None:
        only_segment(task.model)
    check_layers(task.staged.layers, stages, pipeline.repeats)
    if pipeline.layers:
        check_stage_layers(pipeline.layers, task.staged.layers, stages)
    schedule = pipeline_schedule(pipeline, stages, config.train.accumulation)
    return StagedStep(
        task.staged, schedule, layout, pipeline.layers, pipeline.outside == "repeated"
    )


def starting_params(task: Task, config: RunConfig) -> Any:
    """Shapes and dtypes of the params before the first step.

    They are those of `task.init`, or those of the checkpoint that the run begins with, where any
    weight may be a format: what trains is float32 then, and what is frozen keeps the type that it
    is stored in. Raises `RunError` if the checkpoint is of another shape.
    """
    own, start = jax.eval_shape(task.init, jax.random.key(0)), config.train.start_from
    if not start:
        return own
    stored = stored_params(locate(start))
    if task.model is not None:
        own = _cut_alike(own, stored, task.model, start)
    found, wanted = (flatten(tree) for tree in (stored, own))
    different = [
        path
        for path in found | wanted
        if path not in found
        or path not in wanted
        or not (is_format(found[path]) or found[path].shape == wanted[path].shape)
    ]
    if different:
        path = different[0]
        there, here = (getattr(tree.get(path), "shape", None) for tree in (found, wanted))
        raise RunError(
            f"train.start_from={start}: {path} is {there} there, {here} in this config "
            f"({len(different)} arrays differ)"
        )
    trainable = by_patterns((config.train.trainable,), stored, "train.trainable")
    return map_leaves(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32 if trainable(path) and _is_real(leaf) else leaf.dtype
        ),
        stored,
    )


def _cut_alike(own: Any, stored: Any, model: ModelConfig, start: str) -> Any:
    """A decoder's own params, their layers stacked as those of a checkpoint are."""
    try:
        segments = segments_of(stored, model)
    except ValueError as error:
        raise RunError(f"train.start_from={start}: {error}") from None
    return {**own, "layers": abstract(model, segments=segments)["layers"]}


def _is_real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def run_rules(
    task: Task, config: RunConfig, layout: Layout, abstract_params: Any
) -> tuple[Rule, ...]:
    """The rules that place a run's params: the task's own, or derived, then those of the config."""
    rules = task.rules
    if rules is None or config.sharding.rules == "auto":
        sizes, model = layout.mesh.shape, task.model
        rules = derive_rules(
            abstract_params,
            "tensor",
            sizes["tensor"],
            fsdp=sizes["fsdp"],
            num_heads=model.num_heads if model else None,
            kv_heads=model.resolve().kv_heads if model else None,
        )
    if config.sharding.extra_rules:
        rules = override_axes(rules, config.sharding.extra_rules, paths(abstract_params))
    return tuple(rules)


def _load(
    folder: str,
    abstract: TrainState,
    optimizer: Any,
    key: Array,
    trainable: Predicate,
    ema: bool,
    placement: Placement,
    window: int,
) -> TrainState:
    """A new state around the params of a checkpoint: fine-tuning begins here."""
    params = load(folder, placement.layout).params
    _, for_steps = jax.random.split(key)

    def build(params: Any, for_steps: Array) -> TrainState:
        params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, abstract.params)
        feedback = abstract.feedback
        return new_state(params, optimizer, for_steps, trainable, ema, window, feedback)

    return jax.jit(build, out_shardings=placement.state)(params, for_steps)


def placed(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with the shardings they will have, which is what a restore needs."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
