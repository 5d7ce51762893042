"""The quantized product for a CPU: a few rows of codes at a time become float32 and are multiplied
while they are still in the cache, so the float32 matrix never exists.

XLA on a CPU does not move a conversion into a product: it would write the whole matrix out as
float32 first, which takes twenty times as long as the product of one row. One row of input
multiplies and adds row after row of codes, in one pass over the words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul import reference
from kernels_pallas.quantized_matmul.operand import Operand, held_rows
from kernels_pallas.quantized_matmul.packing import PLANES, WORD_ROWS, tile_rows, unpack
from kernels_pallas.quantized_matmul.sizes import tuning_key
from kernels_pallas.tuning import best

Array = jax.Array

STEP_ROWS = 256
"""Most rows of codes of a step."""
STEP_COLUMNS = 1024
"""Columns of a step: `STEP_ROWS` of them in float32 fit a core's second-level cache."""
VECTOR_ROWS = 16
"""Rows of codes, one an element, that one row of input multiplies in one pass."""


def matmul(x: Array, w: Operand) -> Array:
    """`[M, rows] -> float32[M, N]`; see `reference.matmul`."""
    x = x.astype(jnp.float32)
    sizes = _sizes(x.shape[0], w)
    rows, vector = _step_rows(w, sizes["rows"]), _vector_rows(w)
    if sizes["route"] == "whole" or rows is None:
        return reference.matmul(x, w)
    covered = jnp.pad(x, ((0, 0), (0, _covered(w) - w.rows)))
    if sizes["route"] == "vector" and vector is not None:
        y = _vector(covered[0], w, vector)[None]
    else:
        y = _by_columns(covered, w, rows, sizes["columns"])
    sums = jnp.sum(x.reshape(x.shape[0], w.groups, w.group), axis=-1)
    return y + jnp.dot(sums, reference.corrections(w), precision=jax.lax.Precision.HIGHEST)


def matmul_transposed(dy: Array, w: Operand) -> Array:
    """`[M, N] -> float32[M, rows]`; see `reference.matmul_transposed`."""
    rows = _step_rows(w, STEP_ROWS)
    if rows is None:
        return reference.matmul_transposed(dy.astype(jnp.float32), w)
    dy = dy.astype(jnp.float32)

    def step(i: Array, words: Array, made: Array) -> Array:
        ours = jnp.dot(dy, _matrix(w, words, i, rows, 0).T)
        return jax.lax.dynamic_update_slice_in_dim(made, ours, i * rows, axis=1)

    dx = _walk(step, _zeros((dy.shape[0], _covered(w)), w), w, rows, 0, w.columns)[:, : w.rows]
    constant = jnp.dot(dy, reference.corrections(w).T, precision=jax.lax.Precision.HIGHEST)
    return dx + jnp.repeat(constant, w.group, axis=1)


def parameter_gradients(x: Array, dy: Array, w: Operand) -> Operand:
    """See `reference.parameter_gradients`."""
    return reference.parameter_gradients(x.astype(jnp.float32), dy.astype(jnp.float32), w)


def default_sizes(m: int, w: Operand) -> dict[str, Any]:
    """The route of `m` rows of input and the largest steps, where nothing was measured: "vector"
    for one row, "blocks", or "whole" for a float32 matrix after all.
    """
    if m == 0 or _step_rows(w, STEP_ROWS) is None:
        route = "whole"
    else:
        route = "vector" if m == 1 and _vector_rows(w) is not None else "blocks"
    return {"route": route, "rows": STEP_ROWS, "columns": STEP_COLUMNS}


def fits(sizes: Mapping[str, Any], m: int, w: Operand) -> bool:
    """Whether a route serves these arrays."""
    if sizes["route"] == "vector":
        return m == 1 and _vector_rows(w) is not None
    return sizes["route"] == "whole" or _step_rows(w, sizes["rows"]) is not None


def _sizes(m: int, w: Operand) -> dict[str, Any]:
    default = default_sizes(m, w)
    key = tuning_key("blocks", m, w, jnp.float32, "cpu")
    return best(key, default, fits=functools.partial(fits, m=m, w=w)) if m else default


def _by_columns(x: Array, w: Operand, rows: int, columns: int) -> Array:
    """Column block after column block, each summed over all rows; the last reaches back, so that
    every block has the same width.
    """
    width = min(columns, w.columns)
    count = -(-w.columns // width)

    def block(n: Array | int, out: Array) -> Array:
        first = jnp.minimum(n * width, w.columns - width)

        def step(i: Array, words: Array, total: Array) -> Array:
            ours = jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
            return total + jnp.dot(ours, _matrix(w, words, i, rows, first))

        total = _walk(step, _zeros((x.shape[0], width), w), w, rows, first, width)
        return jax.lax.dynamic_update_slice_in_dim(out, total, first, axis=1)

    out = _zeros((x.shape[0], w.columns), w)
    return block(0, out) if count == 1 else jax.lax.fori_loop(0, count, block, out)


def _vector(x: Array, w: Operand, rows: int) -> Array:
    """One row of input, `[covered rows] -> [N]`."""
    values = _looked_up(w)

    def step(i: Array, words: Array, total: Array) -> Array:
        ours = jax.lax.dynamic_slice_in_dim(x, i * rows, rows)
        made = jnp.zeros(w.columns)
        for k in range(rows):
            made = made + ours[k] * values(_row(w, words, k))
        return total + made * _scale_rows(w, i, rows, 0, w.columns)[0]

    return _walk(step, _zeros((w.columns,), w), w, rows, 0, w.columns)


def _walk(
    step: Callable[[Array, Array, Array], Array],
    start: Array,
    w: Operand,
    rows: int,
    first: Array | int,
    width: int,
) -> Array:
    """`step(i, words, total) -> total` over all steps of `rows` rows, in `width` columns."""
    count = _covered(w) // rows
    if not w.packed or len(PLANES[w.bits]) == 1:
        return jax.lax.fori_loop(
            0, count, lambda i, total: step(i, _words(w, i, rows, first, width), total), start
        )

    def ahead(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, words = carry
        return step(i, words, total), _words(w, i + 1, rows, first, width)

    # Words that are read in place and cut into planes, XLA would unpack element by element; the
    # words of the next step are carried instead.
    return jax.lax.fori_loop(0, count, ahead, (start, _words(w, 0, rows, first, width)))[0]


def _zeros(shape: tuple[int, ...], w: Operand) -> Array:
    """Where a sum starts; inside `jax.shard_map` it varies over the axes that the codes do."""
    axes = tuple(jax.typeof(w.codes).manual_axis_type.varying)
    return jax.lax.pcast(jnp.zeros(shape), axes, to="varying") if axes else jnp.zeros(shape)


def _row(w: Operand, words: Array, k: int) -> Array:
    """The codes of row k of a tile of one plane, `[N]`."""
    if not w.packed:
        return words[k]
    slab, rest = divmod(k, 2 * WORD_ROWS)
    place = w.bits * slab + 16 * (rest % 2)
    return (words[rest // 2] >> place) & (2**w.bits - 1)


def _words(w: Operand, i: Array | int, rows: int, first: Array | int, width: int) -> Array:
    """The codes of step i, as they are stored."""
    stored = rows * w.bits // 32 if w.packed else rows
    start = (i * stored, first)
    return jax.lax.dynamic_slice(w.codes, start, (stored, width))


def _matrix(w: Operand, words: Array, i: Array | int, rows: int, first: Array | int) -> Array:
    """`scale * value`, `float32[rows, width]`."""
    codes = unpack(words, w.bits, dtype=jnp.uint32) if w.packed else words
    made, width = _looked_up(w)(codes), words.shape[1]
    scales = _scale_rows(w, i, rows, first, width)
    return (made.reshape(len(scales), -1, width) * scales[:, None]).reshape(rows, width)


def _looked_up(w: Operand) -> Callable[[Array], Array]:
    if w.table is None:
        return lambda codes: codes.astype(jnp.int32).astype(jnp.float32)
    table = w.table.astype(jnp.float32)
    return lambda codes: reference.look_up(table, codes)


def _scale_rows(w: Operand, i: Array | int, rows: int, first: Array | int, width: int) -> Array:
    """The scales of step i, `float32[groups of the step, width]`."""
    if w.groups == 1:
        start, count = 0, 1
    elif rows >= w.group:
        count = rows // w.group
        start = i * count
    else:
        start, count = i // (w.group // rows), 1
    found = jax.lax.dynamic_slice(w.scales, (start, first), (count, width))
    return found.astype(jnp.float32)


def _step_rows(w: Operand, most: int) -> int | None:
    """Rows of a step: whole tiles, and whole groups or an even part of one; None if there is no
    such number.
    """
    tile, covered = (tile_rows(w.bits) if w.packed else 1), _covered(w)
    if w.select is not None or (covered > w.rows and w.groups > 1):
        return None
    fitting = [
        rows
        for rows in range(tile, min(most, covered) + 1, tile)
        if covered % rows == 0 and (w.groups == 1 or rows % w.group == 0 or w.group % rows == 0)
    ]
    return fitting[-1] if fitting and (fitting[-1] >= 16 or covered <= most) else None


def _vector_rows(w: Operand) -> int | None:
    """Rows of a step for one row of input; None where the blocks are faster."""
    if w.packed and w.bits != 4:
        return None
    rows = tile_rows(w.bits) if w.packed else VECTOR_ROWS
    whole = _covered(w) % rows == 0 and (w.groups == 1 or w.group % rows == 0)
    return rows if whole and w.select is None else None


def _covered(w: Operand) -> int:
    """Rows that the stored codes stand for; more than `w.rows` where a tile is filled up."""
    return held_rows(w.codes, w.bits)
