"""Optimizers by name, from Optax, as directions: the step multiplies by the learning rate of the
moment.

Decoupled weight decay (on matrices, unless patterns say otherwise) and multipliers by path are the
same for all. Defaults of None mean the value in each optimizer's own paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import optax

from sharding import Rule
from training.layer_trust import is_stacked, matrix_rank, per_layer, scale_by_layer_trust_ratio
from training.muon import scale_by_muon
from training.parametrization import decay_weights, multipliers, scale_learning_rates
from training.trainable import Predicate, by_patterns, map_leaves
from weights import nearest

Link = optax.GradientTransformation


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and its settings.

    name: adamw, adafactor, lion, lamb, muon or sgd.
    learning_rate: peak of the schedule.
    weight_decay: decoupled; a step subtracts learning rate * weight_decay * parameter.
    decay: patterns of the paths that decay; None: all matrices, embedding tables included.
    b1: decay of the first moment; None: 0.9.
    b2: decay of the second moment; None: 0.95 for adamw and muon, 0.999 for lamb, 0.99 for lion.
    eps: added to the root of the second moment; None: 1e-8, or 1e-6 for lamb.
    momentum: of muon and sgd; None: 0.95 for muon, 0.9 for sgd.
    nesterov: Nesterov momentum in muon and sgd.
    update_rms: muon: size of an update per unit of learning rate; None: Jordan's scale by shape.
    matrices: muon: patterns of the paths it orthogonalises; None: all matrices under layers/.
    clip_threshold: adafactor: largest root mean square of an update before it is scaled.
    factor_from: adafactor: a matrix with both sides at least this long has a factored moment.
    moment_dtype: type that first moments are stored in, float32 or bfloat16.
    learning_rates: pairs of (path pattern, multiplier of the learning rate).
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    decay: tuple[str, ...] | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool = True
    update_rms: float | None = 0.2
    matrices: tuple[str, ...] | None = None
    clip_threshold: float = 1.0
    factor_from: int = 128
    moment_dtype: str = "float32"
    learning_rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse unknown names and values out of range."""
        if self.name not in OPTIMIZERS:
            hint = nearest(self.name, OPTIMIZERS) or ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer.name is {self.name!r}, which is unknown; nearest: {hint}")
        for field in ("b1", "b2", "momentum"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"optimizer.{field} is {value}: it must lie in [0, 1)")
        for field in ("learning_rate", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"optimizer.{field} is {getattr(self, field)}: it can't be negative"
                )
        if self.moment_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"optimizer.moment_dtype is {self.moment_dtype!r}: give float32 or bfloat16"
            )


def make_optimizer(
    config: OptimizerConfig, trainable: Any, rules: Iterable[Rule] = ()
) -> optax.GradientTransformation:
    """The transform whose updates, times minus the learning rate, are added to the parameters.

    `trainable` is the tree of leaves that train (arrays or shapes, None where frozen); a pattern of
    the config that matches none of them is an error.
    """
    table = multipliers(trainable, rules, config.learning_rates)
    decay = decay_weights(config.weight_decay, table, _decays(config, trainable))
    return optax.chain(
        OPTIMIZERS[config.name](config, trainable, decay), scale_learning_rates(table)
    )


def adamw(config: OptimizerConfig, trainable: Any, decay: Link) -> Link:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""
    return optax.chain(_adam(config, b2=0.95, eps=1e-8), decay)


def lamb(config: OptimizerConfig, trainable: Any, decay: Link) -> Link:
    """AdamW with the trust ratio of every layer's matrix (You et al., arXiv 1904.00962)."""
    return optax.chain(_adam(config, b2=0.999, eps=1e-6), decay, scale_by_layer_trust_ratio())


def lion(config: OptimizerConfig, trainable: Any, decay: Link) -> Link:
    """Sign of interpolated momentum (Chen et al., arXiv 2302.06675)."""
    b1, b2 = _or(config.b1, 0.9), _or(config.b2, 0.99)
    return optax.chain(optax.scale_by_lion(b1, b2, mu_dtype=config.moment_dtype), decay)


def adafactor(config: OptimizerConfig, trainable: Any, decay: Link) -> Link:
    """Factored second moment, clipped, scaled by each matrix's size (Shazeer and Stern, arXiv
    1804.04235).

    The learning rate is relative to the root mean square of the matrix.
    """
    direction = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=config.factor_from),
        optax.clip_by_block_rms(config.clip_threshold),
        optax.scale_by_param_block_rms(),
    )
    return optax.chain(per_layer(direction), decay)


def muon(config: OptimizerConfig, trainable: Any, decay: Link) -> Link:
    """Orthogonalised momentum for hidden matrices, AdamW for embeddings, head and vectors."""
    if config.matrices is None:
        chosen: Predicate = is_stacked
    else:
        chosen = by_patterns(config.matrices, trainable, "optimizer.matrices")
    labels = map_leaves(
        lambda path, leaf: "muon" if chosen(path) and matrix_rank(path, leaf) >= 2 else "adam",
        trainable,
    )
    orthogonal = scale_by_muon(
        _or(config.momentum, 0.95), config.nesterov, config.update_rms, config.moment_dtype
    )
    adam = _adam(config, b2=0.95, eps=1e-8)
    return optax.chain(optax.partition({"muon": orthogonal, "adam": adam}, labels), decay)


def sgd(config: OptimizerConfig, trainable: Any, decay: Link) -> Link:
    """Stochastic gradient descent with (Nesterov) momentum; 0 keeps no state."""
    momentum = _or(config.momentum, 0.9)
    if momentum == 0:
        return decay
    return optax.chain(optax.trace(momentum, config.nesterov, config.moment_dtype), decay)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Any, Link], Link]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "lamb": lamb,
    "muon": muon,
    "sgd": sgd,
}
"""Optimizer name -> `(config, trainable, weight decay as a transform) -> transform` of one unit of
learning rate."""


def _adam(config: OptimizerConfig, b2: float, eps: float) -> Link:
    return optax.scale_by_adam(
        _or(config.b1, 0.9), _or(config.b2, b2), _or(config.eps, eps), mu_dtype=config.moment_dtype
    )


def _decays(config: OptimizerConfig, trainable: Any) -> Callable[[str, Any], bool]:
    """Whether the array at a path decays: by the config's patterns, or every matrix."""
    if config.decay is None:
        return lambda path, leaf: matrix_rank(path, leaf) >= 2
    chosen = by_patterns(config.decay, trainable, "optimizer.decay")
    return lambda path, leaf: chosen(path)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
