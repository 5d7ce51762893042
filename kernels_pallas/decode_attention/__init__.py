"""Attention of one query, or a few, of each sequence to its cache."""

from kernels_pallas.decode_attention.api import IMPLEMENTATIONS, decode_attention
from kernels_pallas.decode_attention.shapes import SHAPES, DecodeShape
from kernels_pallas.decode_attention.softmax import Softmax, Unified, fallen_rows

__all__ = [
    "IMPLEMENTATIONS",
    "SHAPES",
    "DecodeShape",
    "Softmax",
    "Unified",
    "decode_attention",
    "fallen_rows",
]
