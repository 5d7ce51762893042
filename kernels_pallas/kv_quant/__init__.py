"""Keys and values in few bits: pages of 8, 4 or 2, and attention that dequantizes on the way."""

from kernels_pallas.kv_quant.api import IMPLEMENTATIONS, kivi_attention, quantized_attention
from kernels_pallas.kv_quant.pages import (
    Int8Pages,
    KiviPages,
    QuantizedPages,
    dequantize_groups,
    pack,
    quantize_groups,
    quantize_int8,
    unpack,
)
from kernels_pallas.kv_quant.shapes import SHAPES, QuantizedShape

__all__ = [
    "IMPLEMENTATIONS",
    "SHAPES",
    "Int8Pages",
    "KiviPages",
    "QuantizedPages",
    "QuantizedShape",
    "dequantize_groups",
    "kivi_attention",
    "pack",
    "quantize_groups",
    "quantize_int8",
    "quantized_attention",
    "unpack",
]
