"""Realistic argument shapes of the product with bit planes, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BitPlanesShape:
    """Sizes of one call: x `int8[m, rows]`, `bits` planes of `[rows, columns]`."""

    m: int
    rows: int
    columns: int
    bits: int


SHAPES: dict[str, BitPlanesShape] = {
    "llama_7b_up_w2": BitPlanesShape(1, 4096, 11008, 2),
    "llama_7b_up_w3": BitPlanesShape(16, 4096, 11008, 3),
    "llama_7b_up_w4": BitPlanesShape(16, 4096, 11008, 4),
    "llama_7b_up_w4_prefill": BitPlanesShape(2048, 4096, 11008, 4),
}
"""Name -> sizes of a published model."""
