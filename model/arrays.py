"""How an array of the model is described, once: shape, logical axes, initial values and training
multipliers.

Each part of a block lists its arrays beside the function that reads them; `model.parameters` turns
the lists into abstract params, initial params and sharding rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True)
class ArraySpec:
    """One array of the params tree, without the layer axis.

    shape: sizes.
    axes: a logical axis name, or None, for each dimension.
    init: "normal", "zeros" or "ones".
    scale: standard deviation of "normal".
    learning_rate: multiplies the learning rate.
    weight_decay: multiplies the weight decay.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 1.0
    learning_rate: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Part:
    """A mixer or a feed-forward: the key of its params in a block, its arrays, and the function
    that reads them.

    `apply(params, x, config, context, carry) -> (y, carry, aux)` with x and y `[batch, length,
    d_model]`.
    """

    key: str
    arrays: Callable[[ModelConfig], dict[str, ArraySpec]]
    apply: Callable[..., tuple[Any, dict[str, Any], dict[str, Any]]]


def vector(size: int, axis: str | None, init: str = "zeros") -> ArraySpec:
    """A bias or norm scale: never decayed."""
    return ArraySpec((size,), (axis,), init, weight_decay=0.0)


def hidden_kernel(
    config: ModelConfig,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    std: float = 1.0,
) -> ArraySpec:
    """A matrix inside a block, or one for each expert; `std` multiplies `init_std`. With μP its
    std and learning rate follow the width.

    Tensor Programs V, table 8: variance and Adam learning rate of hidden matrices are proportional
    to 1 / width.
    """
    ratio = 1.0 if config.base_d_model is None else config.base_d_model / config.d_model
    return ArraySpec(shape, axes, "normal", config.init_std * std * ratio**0.5, learning_rate=ratio)


def output_std(config: ModelConfig) -> float:
    """Factor on `init_std` for matrices that write to the residual stream: `1 / sqrt(2 num_layers)`
    (GPT-2).
    """
    return (2 * config.num_layers) ** -0.5
