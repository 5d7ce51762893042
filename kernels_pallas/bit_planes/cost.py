"""Operations and bytes of the product with bit planes, for a roofline."""

from __future__ import annotations


def cost(m: int, rows: int, columns: int, bits: int) -> tuple[int, int]:
    """`(operations, bytes)` of `int8[m, rows] x [rows, columns]` codes of `bits` planes, each array
    once. The operations do not grow with the planes; the bytes do.
    """
    return 2 * m * rows * columns, m * rows + rows * columns * bits // 8 + 4 * m * columns
