"""Exact integer products with codes that lie in planes of one bit each, of any width up to 8."""

from kernels_pallas.bit_planes.api import IMPLEMENTATIONS, binary_coded_matmul, bit_planes_matmul
from kernels_pallas.bit_planes.cost import cost
from kernels_pallas.bit_planes.reference import CODINGS, pack_planes, unpack_planes
from kernels_pallas.bit_planes.shapes import SHAPES, BitPlanesShape

__all__ = [
    "CODINGS",
    "IMPLEMENTATIONS",
    "SHAPES",
    "BitPlanesShape",
    "binary_coded_matmul",
    "bit_planes_matmul",
    "cost",
    "pack_planes",
    "unpack_planes",
]
