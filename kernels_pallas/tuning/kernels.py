"""The kernels that can be tuned. A kernel is added by a `tune.py` in its folder and a line here."""

from __future__ import annotations

from kernels_pallas.attention import tune as attention
from kernels_pallas.bit_planes import tune as bit_planes
from kernels_pallas.decode_attention import tune as decode_attention
from kernels_pallas.flat_gemm import tune as flat_gemm
from kernels_pallas.grouped_matmul import tune as grouped_matmul
from kernels_pallas.int8_matmul import tune as int8_matmul
from kernels_pallas.kv_quant import tune as kv_quant
from kernels_pallas.paged_attention import tune as paged_attention
from kernels_pallas.quantized_matmul import tune as quantized_matmul
from kernels_pallas.tuning.tunable import Tunable

KERNELS: dict[str, Tunable] = {
    "attention.tpu_forward": attention.FORWARD,
    "attention.tpu_backward": attention.BACKWARD,
    "bit_planes.blocks": bit_planes.BLOCKS,
    "bit_planes.tpu": bit_planes.TPU,
    "decode_attention.tpu": decode_attention.TPU,
    "flat_gemm.routes": flat_gemm.ROUTE,
    "grouped_matmul.blocks": grouped_matmul.BLOCKS,
    "int8_matmul.blocks": int8_matmul.BLOCKS,
    "int8_matmul.tpu": int8_matmul.TPU,
    "int8_matmul.tpu_quantizer": int8_matmul.QUANTIZER,
    "kv_quant.tpu": kv_quant.TPU,
    "paged_attention.tpu": paged_attention.TPU,
    "quantized_matmul.blocks": quantized_matmul.BLOCKS,
    "quantized_matmul.tpu": quantized_matmul.TPU,
}
"""Kernel, as in `Key.kernel` -> what there is to tune."""
