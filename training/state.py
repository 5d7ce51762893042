"""Everything that a step changes, as one pytree; made in place on its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sharding import Layout, Rule, partition, state_shardings
from training.averaging import start_average
from training.spike_guard import no_losses
from training.trainable import Predicate, everything, map_leaves, split_trainable

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint must hold, beside the data cursor, for a run to go on bit for bit.

    params: all parameters; those that train are float32 masters.
    opt_state: the optimizer's, for trainable leaves only.
    step: int32[], steps taken, the refused ones included.
    skipped: int32[], updates refused: not finite, or a spike.
    rng: key data of the run's seed, uint32; constant, a step folds its number in.
    ema: averages of the trainable leaves, float32 (None where frozen); or None.
    losses: float32[window], those that spikes are refused by (`training.spike_guard`); or None.
    feedback: float32 of what reduced gradients lost by rounding (`training.hierarchical`), one of
        each device that they are not split over; or None.
    """

    params: Any
    opt_state: Any
    step: Any
    skipped: Any
    rng: Any
    ema: Any = None
    losses: Any = None
    feedback: Any = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """NamedShardings of a run's state and of its gradients (None where frozen)."""

    state: TrainState
    gradients: Any
    layout: Layout


def new_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    rng: Array,
    trainable: Predicate = everything,
    ema: bool = False,
    window: int = 0,
    feedback: Any = None,
) -> TrainState:
    """The state before the first step; `rng` is the key that steps fold their number into.

    `feedback`: shapes of what error feedback keeps.
    """
    ours, _ = split_trainable(params, trainable)
    return TrainState(
        params=params,
        opt_state=optimizer.init(ours),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(rng),
        ema=start_average(ours) if ema else None,
        losses=no_losses(window) if window else None,
        feedback=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), feedback),
    )


def init_state(
    init_params: Callable[[Array], Any],
    optimizer: optax.GradientTransformation,
    rng: Array,
    trainable: Predicate = everything,
    ema: bool = False,
    placement: Placement | None = None,
    window: int = 0,
    feedback: Any = None,
) -> TrainState:
    """`init_params(key)` and its state, compiled so that each device makes only its own part."""
    for_params, for_steps = jax.random.split(rng)

    def build(for_params: Array, for_steps: Array) -> TrainState:
        params = init_params(for_params)
        return new_state(params, optimizer, for_steps, trainable, ema, window, feedback)

    shardings = None if placement is None else placement.state
    return jax.jit(build, out_shardings=shardings)(for_params, for_steps)


def abstract_state(
    abstract_params: Any,
    optimizer: optax.GradientTransformation,
    trainable: Predicate = everything,
    ema: bool = False,
    window: int = 0,
    feedback: Any = None,
) -> TrainState:
    """The state's shapes and dtypes, with nothing allocated; `feedback` has its shardings."""
    state = jax.eval_shape(
        lambda params: new_state(params, optimizer, jax.random.key(0), trainable, ema, window),
        abstract_params,
    )
    return dataclasses.replace(state, feedback=feedback)


def place(
    abstract: TrainState,
    rules: Iterable[Rule],
    layout: Layout,
    trainable: Predicate = everything,
) -> Placement:
    """Shardings of a state and its gradients by the table's roles: weights, gradients, optimizer.

    Moments and averages go where the table puts their parameter's optimizer state; counters are on
    every device. With collectives of its own a step makes its weights from masters that lie with
    the optimizer's state, and leaves gradients there.
    """
    rules = tuple(rules)
    explicit = layout.collectives is not None
    roles = ("optimizer",) * 3 if explicit else ("weights", "gradients", "optimizer")
    weights, gradients, moments = (
        partition(abstract.params, rules, layout, role=role) for role in roles
    )
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    state = TrainState(
        params=weights,
        opt_state=state_shardings(abstract.opt_state, abstract.params, moments),
        step=everywhere,
        skipped=everywhere,
        rng=everywhere,
        ema=state_shardings(abstract.ema, abstract.params, moments),
        losses=None if abstract.losses is None else everywhere,
        feedback=jax.tree.map(lambda leaf: leaf.sharding, abstract.feedback),
    )
    ours = map_leaves(lambda path, sharding: sharding if trainable(path) else None, gradients)
    return Placement(state, ours, layout)
