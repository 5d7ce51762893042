"""Realistic argument shapes of the quantized product, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizedMatmulShape:
    """Sizes of one call: x `[m, rows]`, codes of `bits` bits `[rows, columns]`, `group` rows to a
    scale (None: one scale a column), with zeros or a table.
    """

    m: int
    rows: int
    columns: int
    bits: int
    group: int | None
    zeros: bool = False
    table: bool = False


SHAPES: dict[str, QuantizedMatmulShape] = {
    "quickstart_int8": QuantizedMatmulShape(2048, 384, 1024, 8, None),
    "llama3_8b_query_int4": QuantizedMatmulShape(16, 4096, 4096, 4, 128, zeros=True),
    "llama3_8b_up_int4": QuantizedMatmulShape(16, 4096, 14336, 4, 128, zeros=True),
    "llama3_8b_down_int4": QuantizedMatmulShape(16, 14336, 4096, 4, 128, zeros=True),
    "llama3_8b_up_int3": QuantizedMatmulShape(16, 4096, 14336, 3, 128, zeros=True),
    "llama3_8b_up_int2": QuantizedMatmulShape(16, 4096, 14336, 2, 64, zeros=True),
    "llama3_8b_up_int8": QuantizedMatmulShape(16, 4096, 14336, 8, 128),
    "llama3_8b_up_nf4": QuantizedMatmulShape(16, 4096, 14336, 4, 64, table=True),
    "llama2_7b_down_int4": QuantizedMatmulShape(1, 11008, 4096, 4, 128, zeros=True),
    "llama3_8b_up_int4_prefill": QuantizedMatmulShape(4096, 4096, 14336, 4, 128, zeros=True),
    "qlora_7b_nf4": QuantizedMatmulShape(2048, 4096, 11008, 4, 64, table=True),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
