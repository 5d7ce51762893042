"""The grouped product by the name of its implementation; every implementation computes what
`reference` defines.
"""

from __future__ import annotations

import difflib
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import primitives

Array = jax.Array

IMPLEMENTATIONS = primitives.IMPLEMENTATIONS
"""Name -> module with `grouped_matmul` and `grouped_outer`."""


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    transposed: bool = False,
    dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """Each row times the matrix of its group: `y_r = x_r w_e`, differentiable in x and w.

    Args:
        x: `[rows, in]`, sorted by group. With `transposed`, `[rows, out]`.
        w: `[groups, in, out]`; cast to `x.dtype`, its gradient comes back in its own type.
        group_sizes: `int32[groups]`, rows of each group. Their sum may be less than `rows`: the
            rows after it give 0 and have gradient 0.
        transposed: multiply by `w_e^T`.
        dtype: of the result, `[rows, out]`; sums are in float32. None is `x.dtype`.
        implementation: a name in `IMPLEMENTATIONS`; None takes the platform's.
    """
    inner = 2 if transposed else 1
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[inner]:
        raise ValueError(
            f"grouped_matmul takes x [rows, in] and w [groups, in, out]; got x {x.shape} and "
            f"w {w.shape}" + (", transposed" if transposed else "")
        )
    _check(group_sizes, w.shape[0], implementation)
    kind = jnp.dtype(dtype or x.dtype)
    return primitives.matmul.bind(
        x, w, group_sizes, transposed=transposed, dtype=kind, implementation=implementation
    )


def grouped_outer(
    x: Array,
    g: Array,
    group_sizes: Array,
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """The gradient of a group's matrix: `[rows, in] x [rows, out] -> [groups, in, out]`, the sum of
    `x_r^T g_r` over the rows of each group.
    """
    if x.ndim != 2 or g.ndim != 2 or x.shape[0] != g.shape[0]:
        raise ValueError(
            f"grouped_outer takes x [rows, in] and g [rows, out]; got x {x.shape}, g {g.shape}"
        )
    _check(group_sizes, group_sizes.shape[0], implementation)
    kind = jnp.dtype(dtype or x.dtype)
    return primitives.outer.bind(x, g, group_sizes, dtype=kind, implementation=implementation)


def _check(group_sizes: Array, groups: int, implementation: str | None) -> None:
    if group_sizes.shape != (groups,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; expected one whole "
            f"number for each of the {groups} groups"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        near = ", ".join(difflib.get_close_matches(implementation, IMPLEMENTATIONS, cutoff=0.0))
        raise ValueError(
            f"grouped_matmul implementation {implementation!r} is not known; nearest: {near}"
        )
