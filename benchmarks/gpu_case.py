"""One GPU kernel at one shape, as `benchmarks/kernels_gpu.py` checks and times it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

HALF = 2.0**-7
"""Of results in bfloat16: softmax weights and result round by up to 2^-9 of themselves, and weights
of either sign add up to less than the largest result; twice that is left as room.
"""
TWICE = 2.0**-6
"""The same, where what goes in is rounded to bfloat16 too: dequantized keys and values, or parts of
the keys that are merged.
"""
GRADIENTS = 2.0**-6
"""Of gradients in bfloat16: weights, their gradients and the cotangents round before products."""
LOG_SUM_EXP = 2.0**-12
"""Of log-sum-exps, whose products and sums are in float32; only the hardware's exponential is less
exact, by 2^-22.
"""
DEQUANTIZED_LOG_SUM_EXP = 2.0**-9
"""The same, where keys are rounded to bfloat16 once they are dequantized."""
ROUNDED_ONCE = 2.0**-8
"""Of exact products in bfloat16: a last bit, where factors are multiplied in another order."""
EXACT = 0.0


@dataclass(frozen=True)
class Rival:
    """Another library's way to the same result.

    name: as the table has it.
    function: of the case's arguments, or of what `prepare` makes of them; raises `ImportError`
        where the library is not installed.
    prepare: outside the time, such as another layout; traceable.
    torch: whether the functions are of torch tensors and not traceable.
    less: whose time is taken off, as that of a forward pass.
    """

    name: str
    function: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] | None = None
    torch: bool = False
    less: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Speed:
    """What a call's time is held against.

    flops, bytes: of the roofline, by the kernel's `cost.py`.
    ceiling: "bfloat16", "int8" or "copy", as `gpu_measure.ceilings` measures them.
    goal: the share of the ceiling that is asked for, or None.
    beside: name of a rival, and how many times its speed is asked for.
    less: a function of the same arguments whose time is taken off, as that of a forward pass.
    rivals: see `Rival`.
    """

    flops: float
    bytes: float
    ceiling: str
    goal: float | None = None
    beside: tuple[str, float] | None = None
    less: Callable[..., Any] | None = None
    rivals: tuple[Rival, ...] = ()


@dataclass(frozen=True)
class GpuCase:
    """A kernel's call, by the operation's public function.

    name: operation, pass and shape, such as "attention forward, llama3_8b".
    make: traceable; arrays of a random key, a tuple.
    kernel: of these arrays, by the GPU kernel.
    plain: the same by the plain function.
    tolerance: largest difference from `plain` in float32, as a part of the largest value: one for
        all results, or one for each.
    served: whether the operation has a GPU kernel at all.
    poison: the arrays with NaN in what is never to be read; only the kernel gets these.
    speed: None if the call is only checked.
    """

    name: str
    make: Callable[[Array], tuple[Any, ...]]
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    tolerance: float | tuple[float, ...]
    served: bool
    poison: Callable[..., tuple[Any, ...]] | None = None
    speed: Speed | None = None

    def poisoned(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the kernel is given."""
        return arguments if self.poison is None else self.poison(*arguments)

    def exact(self, *arguments: Any) -> Any:
        """The plain function of the same numbers in float32, without TensorFloat-32."""
        with jax.default_matmul_precision("highest"):
            return self.plain(*jax.tree.map(widened, arguments))


def widened(x: Any) -> Any:
    """16-bit floating point as float32, anything else as it is."""
    half = hasattr(x, "dtype") and x.dtype in (jnp.bfloat16, jnp.float16)
    return x.astype(jnp.float32) if half else x


def normal(key: Array, *shape: int, dtype: Any = jnp.bfloat16) -> Array:
    """Of variance 1."""
    return jax.random.normal(key, shape, dtype)


def whole(key: Array, low: int, high: int, *shape: int, dtype: Any = jnp.int32) -> Array:
    """Evenly from `low` to `high - 1`."""
    return jax.random.randint(key, shape, low, high, jnp.int32).astype(dtype)
