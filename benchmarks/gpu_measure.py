"""How `benchmarks/kernels_gpu.py` measures: differences on the device, times without the cost of
dispatching, and what the device reaches at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

SAMPLES, SAMPLE_SECONDS, WARM_SECONDS = 11, 0.02, 0.1
"""Of a time: the median of so many samples, each of calls for so long, after so long of warming."""
MOST_CALLS = 2000
"""Of a sample."""
CACHE_BYTES, MOST_COPIES = 4 * 50 * 2**20, 48
"""Four times the cache of a Hopper GPU: arguments of a timed call that memory bounds are copied to
so many bytes, so that none of them is still in the cache when its turn comes again.
"""
CUBES = (4096, 8192)
"""Sizes of the matrix products whose best is the ceiling."""
COPIED_BYTES = 2**30
Clock = Callable[[], float]


def apart(found: Any, expected: Any) -> list[float]:
    """Largest absolute difference of each array of two pytrees, as a part of the largest finite
    value of the second; infinite where only one has a NaN, an infinity or a shape.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return [
        float(_apart(mine, theirs)) if mine.shape == theirs.shape else float("inf")
        for mine, theirs in pairs
    ]


@jax.jit
def _apart(mine: Array, theirs: Array) -> Array:
    both_whole = all(jnp.issubdtype(x.dtype, jnp.integer) for x in (mine, theirs))
    same_bits = jnp.all(mine == theirs) if both_whole else False
    mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
    finite = jnp.isfinite(theirs)
    special = (mine == theirs) | (jnp.isnan(mine) & jnp.isnan(theirs))
    broken = jnp.any(jnp.where(finite, ~jnp.isfinite(mine), ~special))
    most = jnp.max(jnp.where(finite, jnp.abs(theirs), 0), initial=1e-30)
    most_apart = jnp.max(jnp.where(finite, jnp.abs(mine - theirs), 0), initial=0) / most
    least = jnp.float32(1e-7 if both_whole else 0)  # integers that float32 cannot tell apart
    return jnp.where(same_bits, 0, jnp.where(broken, jnp.inf, jnp.maximum(most_apart, least)))


def copies_for(moved: float) -> int:
    """How many copies of arguments of so many bytes do not fit into the cache."""
    return int(min(max(-(-CACHE_BYTES // max(moved, 1)), 1), MOST_COPIES))


def seconds(
    function: Callable[..., Any],
    copies: Sequence[tuple[Any, ...]],
    clock: Clock = time.perf_counter,
) -> float:
    """Time of a call: one program goes through all copies of the arguments, and programs follow
    each other unawaited, so that the device is never idle.

    Args:
        function: traceable.
        copies: its arguments, each time others.
        clock: gives seconds.
    """
    once = jax.jit(function)
    run = jax.jit(lambda copies: [once(*arguments) for arguments in copies])
    compiled = run.lower(list(copies)).compile()
    return sampled(lambda: compiled(list(copies)), jax.block_until_ready, clock) / len(copies)


def sampled(call: Callable[[], Any], wait: Callable[[Any], Any], clock: Clock) -> float:
    """Median time of a call over samples of many, with one wait at the end of each."""

    def sample(repeats: int) -> float:
        out, began = None, clock()
        for _ in range(repeats):
            out = call()
        wait(out)
        return (clock() - began) / repeats

    sample(1)  # whatever the first call sets up
    each = sample(2)
    sample(calls_within(WARM_SECONDS, each))
    repeats = calls_within(SAMPLE_SECONDS, sample(calls_within(SAMPLE_SECONDS, each)))
    return median(sample(repeats) for _ in range(SAMPLES))


def calls_within(limit: float, each: float) -> int:
    """At least one."""
    return int(min(max(limit / max(each, 1e-7), 1), MOST_CALLS))


def torch_seconds(
    function: Callable[..., Any],
    copies: Sequence[tuple[Any, ...]],
    clock: Clock = time.perf_counter,
) -> float:
    """The same of a function of torch tensors, which share the memory of JAX's arrays.

    Raises `ImportError` where there is no torch, or none with CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        raise ImportError("torch has no CUDA")
    jax.block_until_ready(copies)
    tensors = [tuple(torch.from_dlpack(x) for x in arguments) for arguments in copies]

    def call() -> list[Any]:
        return [function(*arguments) for arguments in tensors]

    return sampled(call, lambda _: torch.cuda.synchronize(), clock) / len(copies)


def ceilings(clock: Clock = time.perf_counter) -> dict[str, float]:
    """What this device reaches: operations/s of matrix products by cuBLAS, "bfloat16" and "int8",
    and bytes/s read and written of a copy, "copy"; of each the best of a few ways.
    """
    _warm(clock)
    return {
        "bfloat16": max(product_rate(size, jnp.bfloat16, False, clock) for size in CUBES),
        "int8": max(product_rate(CUBES[-1], jnp.int8, turned, clock) for turned in (False, True)),
        "copy": copy_rate(COPIED_BYTES, clock),
    }


def _warm(clock: Clock, limit: float = 0.5) -> None:
    """Until the clocks of the device have risen."""
    x, multiply, began = jnp.ones((4096, 4096), jnp.bfloat16), jax.jit(jnp.matmul), clock()
    while clock() - began < limit:
        jax.block_until_ready(multiply(x, x))


def product_rate(size: int, dtype: Any, turned: bool, clock: Clock) -> float:
    """Operations/s of two square matrices, the second `turned` in memory or not. They hold random
    numbers: of equal ones a device needs less power, and runs faster than it can.
    """
    wide = jnp.int32 if dtype == jnp.int8 else None

    def multiply(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y.T if turned else y, preferred_element_type=wide)

    keys = jax.random.split(jax.random.key(size))
    if dtype == jnp.int8:
        pair = tuple(jax.random.randint(key, (size, size), -127, 128, dtype) for key in keys)
    else:
        pair = tuple(jax.random.normal(key, (size, size), dtype) for key in keys)
    return 2.0 * size**3 / seconds(multiply, [pair], clock)


def copy_rate(size: int, clock: Clock) -> float:
    """Bytes/s read and written, by a copy and by a program that negates."""
    x = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
    ways = (jnp.copy, jnp.negative)
    return 2.0 * x.nbytes / min(seconds(way, [(x,)], clock) for way in ways)
