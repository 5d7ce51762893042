"""Learning-rate and weight-decay multipliers by path, as transforms that chain with any optimizer;
and μP by them.

They stand beside the sharding rules (`Rule.learning_rate`, `Rule.weight_decay`), where muP puts the
width's share: `model.mup` gives a config whose rules carry it, with the initial scales and the
multipliers of the forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from sharding import Rule
from training.trainable import by_patterns, leaf_paths, map_leaves


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """What one path's update is multiplied by."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0


def multipliers(
    params: Any, rules: Iterable[Rule] = (), learning_rates: Sequence[tuple[str, float]] = ()
) -> dict[str, Multipliers]:
    """`{leaf path: Multipliers}`: those of the first rule that matches, times `learning_rates`.

    A rule that matches a weight holds for the arrays inside it. A pattern of `learning_rates` that
    matches nothing is an error; rules are checked where they place arrays.
    """
    rules, table = tuple(rules), {}
    chosen = [
        (by_patterns([pattern], params, "optimizer.learning_rates"), factor)
        for pattern, factor in learning_rates
    ]
    for path in leaf_paths(params):
        found = _first_match(rules, path)
        rate, decay = (found.learning_rate, found.weight_decay) if found else (1.0, 1.0)
        for matches, factor in chosen:
            rate = rate * factor if matches(path) else rate
        table[path] = Multipliers(rate, decay)
    return table


def decay_weights(
    rate: float,
    table: Mapping[str, Multipliers],
    decays: Callable[[str, jax.Array], bool] = lambda path, leaf: True,
) -> optax.GradientTransformation:
    """Add `rate * weight_decay_p * x` to the update of the array x at each path p that decays.

    Decay is decoupled and moves with the learning rate, as in torch's AdamW: a path whose rate is
    divided by r also decays r times slower, unless its `weight_decay` multiplier is r.
    """

    def decay(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        factor = rate * table[path].weight_decay if decays(path, param) else 0
        return update + factor * param if factor else update

    return _stateless(decay)


def scale_learning_rates(table: Mapping[str, Multipliers]) -> optax.GradientTransformation:
    """Multiply updates by the multipliers of their paths; the last link after any optimizer."""

    def scale(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        factor = table[path].learning_rate
        return update if factor == 1 else factor * update

    return _stateless(scale)


def _first_match(rules: tuple[Rule, ...], path: str) -> Rule | None:
    """A rule names a weight; the arrays inside a format are below its path."""
    parts = path.split("/")
    for stop in range(len(parts), 0, -1):
        for rule in rules:
            if rule.matches("/".join(parts[:stop])):
                return rule
    return None


def _stateless(function: Callable[..., jax.Array]) -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (map_leaves(function, updates, params), state),
    )
