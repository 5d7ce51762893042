"""Three ways to multiply few rows by a dense matrix; which is fastest depends on rows, shape, type
and machine, so it is looked up in a measured table (FlashDecoding++, arXiv 2311.01282).

    library   XLA's product. With many rows; on TPUs and GPUs it reaches the bandwidth with few too
    padded    the same with rows of zeros, up to as many as the hardware's instructions take. XLA on
              a CPU has no fast product of one bfloat16 row: padded, it takes a tenth of the time
    vector    for one row: rows of the matrix are multiplied and added, in one pass over them; for
              CPUs that have no instructions for bfloat16

On an NVIDIA GPU, XLA measures cuBLAS against Triton's kernels, with blocks of few rows and with the
sum in parts, when it compiles: that is this table, kept by the compiler for the device at hand. So
a kernel of our own would be one more candidate without a place in it, and "library" is the route.

Quantized weights have no need of this: their kernels are flat (`quantized_matmul`), with blocks of
as few rows of input as the hardware knows, and the next block of codes on its way meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flat_gemm import reference
from kernels_pallas.target import current_target
from kernels_pallas.tuning import Key, best

Array = jax.Array

PADDED_ROWS = 8
"""Rows of input that the padded product has at least."""
VECTOR_ROWS = 16
"""Rows of the matrix that one row of input multiplies in one pass."""


def padded(x: Array, w: Array) -> Array:
    """`[M, K] x [K, N] -> float32[M, N]` with at least `PADDED_ROWS` rows."""
    missing = max(PADDED_ROWS - x.shape[0], 0)
    return reference.matmul(jnp.pad(x, ((0, missing), (0, 0))), w)[: x.shape[0]]


def vector(x: Array, w: Array) -> Array:
    """`[1, K] x [K, N] -> float32[1, N]`, row after row of the matrix; the library takes more or
    fewer rows.
    """
    if x.shape[0] != 1 or w.shape[0] < VECTOR_ROWS:
        return reference.matmul(x, w)
    x, steps, stored = x.astype(jnp.float32), w.shape[0] // VECTOR_ROWS, _as_stored(w)

    def step(i: Array, total: Array) -> Array:
        first = i * VECTOR_ROWS
        ours = jax.lax.dynamic_slice_in_dim(stored, first, VECTOR_ROWS)
        factors = jax.lax.dynamic_slice_in_dim(x[0], first, VECTOR_ROWS)
        made = jnp.zeros(w.shape[1])
        for k in range(VECTOR_ROWS):
            made = made + factors[k] * _float32(ours[k])
        return total + made

    out = jax.lax.fori_loop(0, steps, step, _zeros((w.shape[1],), x, w))[None]
    first = steps * VECTOR_ROWS
    return out if first == w.shape[0] else out + reference.matmul(x[:, first:], w[first:])


def _as_stored(w: Array) -> Array:
    """bfloat16 as bits: of bfloat16 itself, XLA on a CPU slices a float32 copy of the whole."""
    return jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype == jnp.bfloat16 else w


def _float32(stored: Array) -> Array:
    if stored.dtype != jnp.uint16:
        return stored.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)


def _zeros(shape: tuple[int, ...], *like: Array) -> Array:
    """Where a sum starts; inside `jax.shard_map` it varies over the axes that the arrays do."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))
    zeros = jnp.zeros(shape)
    return jax.lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros


ROUTES: dict[str, Callable[[Array, Array], Array]] = {
    "library": reference.matmul,
    "padded": padded,
    "vector": vector,
}
"""Name -> function of x and w."""


def tuning_key(m: int, k: int, n: int, *, dtype: Any, device_kind: str | None = None) -> Key:
    """What a route is looked up by."""
    return Key.of("flat_gemm.routes", {"m": m, "k": k, "n": n}, dtype, device_kind)


def default_route(m: int, dtype: Any, platform: str) -> str:
    """The route where nothing was measured."""
    half = jnp.dtype(dtype) != jnp.float32
    return "padded" if platform == "cpu" and m == 1 and half else "library"


def choose(x: Array, w: Array) -> str:
    """The route of a call: measured, or the default."""
    m, (k, n) = x.shape[0], w.shape
    platform = current_target().platform
    default = {"route": default_route(m, w.dtype, platform)}

    def fits(found: Mapping[str, int | str]) -> bool:
        return found["route"] in ROUTES and (m == 1 or found["route"] != "vector")

    return str(best(tuning_key(m, k, n, dtype=w.dtype), default, fits=fits)["route"])
