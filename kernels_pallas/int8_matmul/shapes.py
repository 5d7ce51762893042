"""Realistic argument shapes of the 8-bit product, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Int8MatmulShape:
    """Sizes of one call: x `[m, rows]`, w `int8[rows, columns]`."""

    m: int
    rows: int
    columns: int


SHAPES: dict[str, Int8MatmulShape] = {
    "quickstart": Int8MatmulShape(2048, 384, 1024),
    "llama3_8b_decode": Int8MatmulShape(16, 4096, 14336),
    "llama3_8b_prefill": Int8MatmulShape(4096, 4096, 14336),
    "llama2_7b_down": Int8MatmulShape(1, 11008, 4096),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
