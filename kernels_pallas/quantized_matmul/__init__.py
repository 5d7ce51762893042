"""The product with a matrix of few bits: packed codes with scales and zeros, or with a table."""

from kernels_pallas.quantized_matmul.api import IMPLEMENTATIONS, quantized_matmul
from kernels_pallas.quantized_matmul.cost import cost
from kernels_pallas.quantized_matmul.packing import pack, packed_rows, tile_rows, unpack
from kernels_pallas.quantized_matmul.shapes import SHAPES, QuantizedMatmulShape

__all__ = [
    "IMPLEMENTATIONS",
    "SHAPES",
    "QuantizedMatmulShape",
    "cost",
    "pack",
    "packed_rows",
    "quantized_matmul",
    "tile_rows",
    "unpack",
]
