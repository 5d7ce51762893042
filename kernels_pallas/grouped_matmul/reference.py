"""The grouped product in plain `jax.numpy`: the definition that every implementation must match.

Group e owns the rows from `sum(sizes[:e])` on, `sizes[e]` of them; rows after the last group belong
to none.

    y_r = x_r w_e           for each row r of group e, 0 for a row of no group
    W_e = sum_r x_r^T g_r   over the rows r of group e, 0 for an empty group

Every row is multiplied by every matrix here, so the cost grows with the number of groups.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def grouped_matmul(x: Array, w: Array, sizes: Array, transposed: bool, dtype: Any) -> Array:
    """`[rows, in] x [groups, in, out] -> dtype[rows, out]`, or with `w` transposed, `[rows, out] ->
    [rows, in]`.
    """
    spelling = "ri,goi->rgo" if transposed else "ri,gio->rgo"
    every = jnp.einsum(spelling, x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("rgo,rg->ro", every, members(x.shape[0], sizes)).astype(dtype)


def grouped_outer(x: Array, g: Array, sizes: Array, dtype: Any) -> Array:
    """`[rows, in] x [rows, out] -> dtype[groups, in, out]`."""
    mine = members(x.shape[0], sizes).astype(x.dtype)
    return jnp.einsum("rg,ri,ro->gio", mine, x, g, preferred_element_type=jnp.float32).astype(dtype)


def members(rows: int, sizes: Array) -> Array:
    """`float32[rows, groups]`: 1 where a row belongs to a group."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(rows, dtype=sizes.dtype)[:, None]
    return ((row >= ends - sizes) & (row < ends)).astype(jnp.float32)
