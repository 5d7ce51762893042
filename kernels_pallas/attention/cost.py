"""What attention costs at least: operations of its products, and bytes of its arguments and results
read and written once.
"""

from __future__ import annotations

from kernels_pallas.attention.shapes import AttentionShape

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Products of a block of scores with head_dim: `q k^T` and `P V`; and with recomputation `q k^T`,
`dO V^T`, `P^T dO`, `dS^T q`, `dS k`.
"""


def visible_pairs(shape: AttentionShape, causal: bool = True) -> int:
    """Pairs of a query and a key that it sees, of one head of one sequence; the last query is at
    the last key.
    """
    if not causal:
        return shape.queries * shape.keys
    seen = range(shape.keys - shape.queries + 1, shape.keys + 1)
    if shape.window is None:
        return sum(seen)
    return sum(min(keys, shape.window + shape.sinks) for keys in seen)


def forward_cost(
    shape: AttentionShape, causal: bool = True, bytes_per_element: int = 2
) -> tuple[float, float]:
    """`(flops, bytes)` of the forward pass with its log-sum-exp."""
    rows, columns = _elements(shape)
    flops = 2.0 * FORWARD_PRODUCTS * _products(shape, causal)
    scalars = 4 * shape.batch * shape.queries * shape.heads
    return flops, float(bytes_per_element * (2 * rows + 2 * columns) + scalars)


def backward_cost(
    shape: AttentionShape, causal: bool = True, bytes_per_element: int = 2
) -> tuple[float, float]:
    """`(flops, bytes)` of the backward pass; gradients leave it in float32."""
    rows, columns = _elements(shape)
    flops = 2.0 * BACKWARD_PRODUCTS * _products(shape, causal)
    scalars = 3 * 4 * shape.batch * shape.queries * shape.heads
    read = bytes_per_element * (2 * rows + 2 * columns)
    return flops, float(read + 4 * (rows + 2 * columns) + scalars)


def _products(shape: AttentionShape, causal: bool) -> float:
    return float(shape.batch * shape.heads * shape.head_dim * visible_pairs(shape, causal))


def _elements(shape: AttentionShape) -> tuple[int, int]:
    """Of queries and of keys."""
    rows = shape.batch * shape.queries * shape.heads * shape.head_dim
    return rows, shape.batch * shape.keys * shape.kv_heads * shape.head_dim
