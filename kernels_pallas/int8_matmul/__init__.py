"""The exact product of 8-bit integers, and the quantizer that makes them of rows of activations."""

from kernels_pallas.int8_matmul.api import IMPLEMENTATIONS, int8_matmul, quantize_rows
from kernels_pallas.int8_matmul.cost import cost, quantizer_cost
from kernels_pallas.int8_matmul.shapes import SHAPES, Int8MatmulShape

__all__ = [
    "IMPLEMENTATIONS",
    "SHAPES",
    "Int8MatmulShape",
    "cost",
    "int8_matmul",
    "quantize_rows",
    "quantizer_cost",
]
