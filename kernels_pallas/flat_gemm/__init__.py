"""The product of few rows with a dense matrix."""

from kernels_pallas.flat_gemm.api import IMPLEMENTATIONS, flat_gemm
from kernels_pallas.flat_gemm.cost import cost
from kernels_pallas.flat_gemm.shapes import SHAPES

__all__ = ["IMPLEMENTATIONS", "SHAPES", "cost", "flat_gemm"]
