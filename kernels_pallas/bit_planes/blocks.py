"""The product with bit planes for a CPU: 256 rows of codes at a time become float32, whose sums are
exact (`255 * 255 * 256 < 2**24`), and are multiplied while they are in the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.bit_planes.reference import plane_values, unpack_planes
from kernels_pallas.tuning import Key, best

Array = jax.Array

STEP_ROWS = 256
STEP_WORDS = STEP_ROWS // 32
STEP_COLUMNS = 1024
"""Columns of a step, where nothing was measured."""


def tuning_key(m: int, rows: int, columns: int, bits: int, device_kind: str = "cpu") -> Key:
    """What the columns of a step are looked up by."""
    sizes = {"m": m, "rows": rows, "columns": columns}
    return Key.of("bit_planes.blocks", sizes, "int8", device_kind, bits=bits)


def matmul(x: Array, planes: Array, coding: str) -> Array:
    """`[M, rows] x planes -> int32[M, N]`; see `reference.matmul`."""
    bits, words, columns = planes.shape
    _, added = plane_values(bits, coding)
    turned = 2 ** (bits - 1) if coding == "signed" else 0  # code = (code ^ turned) - turned
    factor = 2 if coding == "bipolar" else 1
    key = tuning_key(x.shape[0], x.shape[1], columns, bits)
    most = best(key, {"columns": STEP_COLUMNS}, fits=lambda sizes: sizes["columns"] > 0)["columns"]
    steps, width = words // STEP_WORDS, min(most, columns)
    count = -(-columns // width)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, steps * STEP_ROWS - x.shape[1])))

    def block(n: Array | int, out: Array) -> Array:
        first = jnp.minimum(n * width, columns - width)

        def stored(i: Array | int) -> Array:
            return jax.lax.dynamic_slice(
                planes, (0, i * STEP_WORDS, first), (bits, STEP_WORDS, width)
            )

        def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, words = carry
            codes = unpack_planes(words) ^ turned
            ours = jax.lax.dynamic_slice_in_dim(x, i * STEP_ROWS, STEP_ROWS, axis=1)
            made = jnp.dot(ours, codes.astype(jnp.float32))
            return total + made.astype(jnp.int32), stored(i + 1)

        # The planes of the next step are carried, as in quantized_matmul's blocks.
        start = _varying(jnp.zeros((x.shape[0], width), jnp.int32), planes)
        total, _ = jax.lax.fori_loop(0, steps, step, (start, stored(0)))
        return jax.lax.dynamic_update_slice_in_dim(out, total, first, axis=1)

    out = _varying(jnp.zeros((x.shape[0], columns), jnp.int32), planes)
    total = block(0, out) if count == 1 else jax.lax.fori_loop(0, count, block, out)
    sums = jnp.sum(x, axis=1, keepdims=True).astype(jnp.int32)
    return factor * total + (added - turned) * sums


def _varying(x: Array, like: Array) -> Array:
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
