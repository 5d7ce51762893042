"""A matrix product whose rows are sorted into groups, each with a matrix of its own."""

from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul, grouped_outer
from kernels_pallas.grouped_matmul.shapes import SHAPES, GroupedMatmulShape

__all__ = ["IMPLEMENTATIONS", "SHAPES", "GroupedMatmulShape", "grouped_matmul", "grouped_outer"]
