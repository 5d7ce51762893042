"""Rounding a matrix row by row, each row's error made good by the rows that follow.

GPTQ, and all that share its loop, minimise `|X (W - W')|^2` over a grid for `W'`. With
`H = X^T X` (up to a factor) and `H^-1 = U^T U`, U upper triangular, row k is rounded and the later
rows are moved by `-U_kj / U_kk` times its error (Frantar et al., arXiv 2210.17323, algorithm 1).
Columns of W do not meet, so they may be split over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
TILE = 128
TRIES = 4
"""Dampings that are tried, each ten times the one before."""
HIGHEST = jax.lax.Precision.HIGHEST

Begin = Callable[[Any, Array, Array], Any]
"""`begin(state, group, live [group, N]) -> state` fits a group before its first row is rounded."""
Quantize = Callable[[Any, Array, Array], tuple[Array, Any]]
"""`quantize(state, k, w_k [N]) -> (rounded [N], state)`."""


def without_dead(hessian: Array) -> tuple[Array, Array]:
    """`H [K, K]` with a diagonal of 1 at inputs that were never other than 0, and these,
    `bool[K]`.
    """
    dead = jnp.diagonal(hessian) == 0
    diagonal = jnp.where(dead, 1.0, jnp.diagonal(hessian)).astype(hessian.dtype)
    return _with_diagonal(hessian, diagonal), dead


def inverse_factor(hessian: Array, damping: float) -> tuple[Array, Array]:
    """`U [K, K]`, upper, with `U^T U = (H + damping * mean(diag H) I)^-1`, and the damping used.

    Where the factorization fails the damping is multiplied by 10, up to three times; NaN comes
    back if none succeeds.
    """
    mean = jnp.mean(jnp.diagonal(hessian))

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, _, amount = state
        amount = jnp.where(tries == 0, amount, amount * 10)
        damped = _with_diagonal(hessian, jnp.diagonal(hessian) + amount * mean)
        return tries + 1, _inverse_factor(damped), amount

    def failed(state: tuple[Array, Array, Array]) -> Array:
        tries, factor, _ = state
        return (tries < TRIES) & ~jnp.all(jnp.isfinite(factor))

    start = (jnp.int32(0), jnp.full_like(hessian, jnp.nan), jnp.asarray(damping, hessian.dtype))
    _, factor, amount = jax.lax.while_loop(failed, attempt, start)
    return factor, amount


def column_loop(
    w: Array,
    factor: Array,
    state: Any,
    quantize: Quantize,
    *,
    begin: Begin | None = None,
    group: int | None = None,
    live: bool = False,
) -> tuple[Array, Any, Array]:
    """Round the rows of `W [K, N]` in order.

    Args:
        w: `[K, N]`, in the order of rounding.
        factor: `U [K, K]` of `inverse_factor`, in the same order.
        state: what `begin` and `quantize` hand on, a pytree.
        quantize: rounds one row.
        begin: fits each group of rows.
        group: rows of a group, with `begin`; must divide K.
        live: `begin` sees weights that all earlier rows have moved. Otherwise those as they stood
            at the start of the tile of 128 rows, as the authors' code has it; the two differ for
            groups smaller than that.

    Returns:
        The rounded matrix, the last state, and the loss `[N]`: `tr(D^T H D)` of each column.
    """
    rows = w.shape[0]
    tile = _tile(rows, group if begin else None)
    short = -rows % tile
    w = jnp.pad(w, ((0, short), (0, 0)))
    factor = _with_diagonal(
        jnp.pad(factor, ((0, short), (0, short))),
        jnp.pad(jnp.diagonal(factor), (0, short), constant_values=1),
    )
    later = jnp.arange(w.shape[0])

    def one_tile(index: Array, carry: tuple[Array, Array, Any, Array]) -> Any:
        w, out, state, loss = carry
        first = index * tile
        piece = jax.lax.dynamic_slice_in_dim(w, first, tile)
        square = jax.lax.dynamic_slice(factor, (first, first), (tile, tile))
        if begin is not None and group is not None and group >= tile:
            state = _begin_wide(begin, state, w, first, group)
        rounded, errors, state = _round_tile(
            piece, square, state, quantize, begin, first, rows, min(group or tile, tile), live
        )
        across = jax.lax.dynamic_slice_in_dim(factor, first, tile)
        across = jnp.where(later >= first + tile, across, 0)
        w = w - jnp.matmul(across.T, errors, precision=HIGHEST)
        out = jax.lax.dynamic_update_slice_in_dim(out, rounded, first, 0)
        return w, out, state, loss + jnp.sum(errors**2, axis=0)

    start = (w, jnp.zeros_like(w), state, jnp.zeros_like(w[0]))
    _, out, state, loss = jax.lax.fori_loop(0, w.shape[0] // tile, one_tile, start)
    return out[:rows], state, loss


def _round_tile(
    piece: Array,
    square: Array,
    state: Any,
    quantize: Quantize,
    begin: Begin | None,
    first: Array,
    rows: int,
    group: int,
    live: bool,
) -> tuple[Array, Array, Any]:
    """One tile: its rounded rows, their errors over `U_kk`, and the state. Rows from `rows` on
    fill up the last tile.
    """
    tile = piece.shape[0]
    fit = begin if group < tile else None
    starts = range(0, tile, group) if fit else [0]
    if fit and not live:
        for start in starts:
            state = fit(state, (first + start) // group, piece[start : start + group])
    below = jnp.arange(tile)

    def one_row(k: Array, carry: tuple[Array, Array, Array, Any]) -> Any:
        piece, rounded, errors, state = carry
        row = piece[k]
        new, state = quantize(state, first + k, row)
        error = jnp.where(first + k < rows, (row - new) / square[k, k], 0)
        step = jnp.where(below > k, square[k], 0)
        return (
            piece - step[:, None] * error[None, :],
            rounded.at[k].set(new),
            errors.at[k].set(error),
            state,
        )

    carry = (piece, jnp.zeros_like(piece), jnp.zeros_like(piece), state)
    for start in starts:
        stop = start + group if fit else tile
        if fit and live:
            fitted = fit(carry[3], (first + start) // group, carry[0][start:stop])
            carry = (*carry[:3], fitted)
        carry = jax.lax.fori_loop(start, stop, one_row, carry)
    _, rounded, errors, state = carry
    return rounded, errors, state


def _begin_wide(begin: Begin, state: Any, w: Array, first: Array, group: int) -> Any:
    """Fit a group of a tile or more, where one begins at this tile."""
    return jax.lax.cond(
        first % group == 0,
        lambda state: begin(state, first // group, jax.lax.dynamic_slice_in_dim(w, first, group)),
        lambda state: state,
        state,
    )


def _tile(rows: int, group: int | None) -> int:
    """Rows of a tile: whole groups, or a part that divides one."""
    if group is None:
        return min(TILE, rows)
    if group <= TILE:
        return min(TILE // group * group, rows)
    return max(size for size in range(1, TILE + 1) if group % size == 0)


def _inverse_factor(h: Array) -> Array:
    """With J the reversal, `J H J = L L^T` and `R = J L J` give `H = R R^T` and `U = R^-1`."""
    lower = jax.lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)
    upper = lower[::-1, ::-1]
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    return jax.lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False)


def _with_diagonal(matrix: Array, diagonal: Array) -> Array:
    index = jnp.arange(matrix.shape[0])
    return matrix.at[index, index].set(diagonal)
