"""The grouped product for an NVIDIA GPU: that of `blocks.py`, with more rows at a time.

XLA has no kernel for a ragged dot there: it multiplies every row by every matrix, as if all groups
were one long sum, so its cost grows with the number of groups, and with that of all layers where
they lie in one stack. In a loop over the groups that have rows, each step is one product of cuBLAS
or Triton, and the cost is that of the rows and of the matrices in use. JAX's own example of a
Hopper kernel (`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`) is one launch, but imports JAX's
test dependencies and walks over empty groups too.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas.grouped_matmul import blocks

Array = jax.Array

ROWS = {"matmul": 512, "transposed": 512, "outer": 2048}
"""Rows of a block: enough that a product costs more than its launch and its matrix."""


def grouped_matmul(x: Array, w: Array, sizes: Array, transposed: bool, dtype: Any) -> Array:
    """See `reference.grouped_matmul`."""
    rows = ROWS["transposed" if transposed else "matmul"]
    return blocks.grouped_matmul(x, w, sizes, transposed, dtype, rows)


def grouped_outer(x: Array, g: Array, sizes: Array, dtype: Any) -> Array:
    """See `reference.grouped_outer`."""
    return blocks.grouped_outer(x, g, sizes, dtype, ROWS["outer"])
