"""The grouped product in a loop: group after group, for a CPU a few rows at a time.

A group's matrix is read once and multiplies blocks of its rows until none is left; the last block
reaches into the next group, and what it would write there is left as it was. Empty groups are
skipped, so the cost is that of the rows and of the matrices in use, however many groups there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.tuning import Key, best

Array = jax.Array

DEFAULT_ROWS = {"matmul": 32, "transposed": 32, "outer": 128}
"""Rows of a block, where nothing was measured: few, as each group wastes half a block, and enough
to keep the product busy; more for a group's gradient, as each update reads and writes it.
"""


def tuning_key(
    product: str, rows_per_group: int, d_in: int, d_out: int, dtype: Any, device_kind: str = "cpu"
) -> Key:
    """What the rows of a block depend on; `product` is a name in `DEFAULT_ROWS`."""
    sizes = {"rows_per_group": rows_per_group, "d_in": d_in, "d_out": d_out}
    return Key.of("grouped_matmul.blocks", sizes, dtype, device_kind, product=product)


def _block_rows(
    product: str, rows: int | None, x: Array, groups: int, d_in: int, d_out: int
) -> int:
    if rows is None:
        key = tuning_key(product, len(x) // max(groups, 1), d_in, d_out, x.dtype)
        rows = int(best(key, {"rows": DEFAULT_ROWS[product]})["rows"])
    return max(min(rows, len(x)), 1)


def grouped_matmul(
    x: Array, w: Array, sizes: Array, transposed: bool, dtype: Any, rows: int | None = None
) -> Array:
    """See `reference.grouped_matmul`. rows: of a block; None is what was measured on a CPU."""
    out = jnp.zeros((x.shape[0], w.shape[1 if transposed else 2]), dtype)
    rows = _block_rows("transposed" if transposed else "matmul", rows, x, *w.shape)

    def group(out: Array, e: Array, start: Array, stop: Array) -> Array:
        matrix = jax.lax.dynamic_index_in_dim(w, e, keepdims=False).astype(x.dtype)

        def block(index: Array, out: Array) -> Array:
            first, mine = _rows(start, stop, index, rows, len(x))
            new = _dot(_slice(x, first, len(mine)), matrix, 1, 1 if transposed else 0)
            old = _slice(out, first, len(mine))
            new = jnp.where(mine[:, None], new.astype(dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(out, new, first, 0)

        return jax.lax.fori_loop(0, _count(start, stop, rows), block, out)

    return _over_groups(group, out, sizes) if out.size else out


def grouped_outer(x: Array, g: Array, sizes: Array, dtype: Any, rows: int | None = None) -> Array:
    """See `reference.grouped_outer`, and `grouped_matmul` for `rows`."""
    out = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), dtype)
    rows = _block_rows("outer", rows, x, len(sizes), x.shape[1], g.shape[1])

    def group(out: Array, e: Array, start: Array, stop: Array) -> Array:
        def block(index: Array) -> Array:
            first, mine = _rows(start, stop, index, rows, len(x))
            ours = jnp.where(mine[:, None], _slice(x, first, len(mine)), 0)
            return _dot(ours, _slice(g, first, len(mine)), 0, 0)

        count = _count(start, stop, rows)
        total = jax.lax.fori_loop(1, count, lambda i, total: total + block(i), block(jnp.int32(0)))
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), e, 0)

    return _over_groups(group, out, sizes) if x.size else out


def _over_groups(group: Callable[..., Array], out: Array, sizes: Array) -> Array:
    """`group(out, e, start, stop) -> out` for every group e that has rows, in order."""
    stops = jnp.cumsum(sizes.astype(jnp.int32))

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        row, out = state
        e = jnp.sum(stops <= row, dtype=jnp.int32)  # the group that the row belongs to
        return stops[e], group(out, e, row, stops[e])

    start = (jnp.int32(0), out)
    return jax.lax.while_loop(lambda state: state[0] < stops[-1], body, start)[1]


def _rows(start: Array, stop: Array, index: Array, block: int, rows: int) -> tuple[Array, Array]:
    """The first row of a block, moved back if it would reach beyond the last row, and which of its
    rows are the block's own.
    """
    block = min(block, rows)
    own = start + index * block
    first = jnp.minimum(own, rows - block)
    place = first + jnp.arange(block, dtype=jnp.int32)
    return first, (place >= own) & (place < stop)


def _count(start: Array, stop: Array, block: int) -> Array:
    return (stop - start + block - 1) // block


def _slice(x: Array, first: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, count)


def _dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    dimensions = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
