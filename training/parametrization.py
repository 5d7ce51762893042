"""Learning-rate and weight-decay multipliers by path, as transforms that chain with any optimizer;
and μP by them.

The multipliers stand beside the sharding rules (`Rule.learning_rate`, `Rule.weight_decay`), the
initial scale too (`Rule.scale`); the multipliers of the forward pass are fields of the model's
config.
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


def mup_rules(
    rules: Iterable[Rule], width_ratio: float, keep_decay: bool = False
) -> tuple[Rule, ...]:
    """μP for hidden matrices, r = d_model / base width: initial std / sqrt(r), learning rate / r
    (MiniCPM, table 7).

    Embeddings, vectors and the head keep theirs; the head's 1 / r belongs to the forward pass.
    `keep_decay` multiplies their weight decay by r, so that decay per step does not shrink with the
    width.
    """

    def widen(rule: Rule) -> Rule:
        if "layers/" not in rule.pattern or len(rule.axes) < 2:
            return rule
        return dataclasses.replace(
            rule,
            scale=rule.scale / width_ratio**0.5,
            learning_rate=rule.learning_rate / width_ratio,
            weight_decay=rule.weight_decay * (width_ratio if keep_decay else 1.0),
        )

    return tuple(widen(rule) for rule in rules)


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
