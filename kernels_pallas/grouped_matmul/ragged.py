"""The grouped product by XLA's ragged dot, which TPUs have a kernel for.

On a CPU and on NVIDIA's GPUs the same instruction multiplies every row by every matrix; it is what
the compiler can split over devices by itself.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.lax import RaggedDotDimensionNumbers, ragged_dot_general

Array = jax.Array


def grouped_matmul(x: Array, w: Array, sizes: Array, transposed: bool, dtype: Any) -> Array:
    """See `reference.grouped_matmul`."""
    numbers = RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return ragged_dot_general(x, w.astype(x.dtype), sizes, numbers, preferred_element_type=dtype)


def grouped_outer(x: Array, g: Array, sizes: Array, dtype: Any) -> Array:
    """See `reference.grouped_outer`."""
    numbers = RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return ragged_dot_general(x, g, sizes, numbers, preferred_element_type=dtype)
