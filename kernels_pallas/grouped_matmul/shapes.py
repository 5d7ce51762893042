"""Realistic argument shapes of the grouped product, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupedMatmulShape:
    """Sizes of one call: x `[rows, d_in]`, w `[groups, d_in, d_out]`."""

    rows: int
    groups: int
    d_in: int
    d_out: int


SHAPES: dict[str, GroupedMatmulShape] = {
    "moe_small": GroupedMatmulShape(4096, 8, 192, 512),
    "mixtral_8x7b": GroupedMatmulShape(16384, 8, 4096, 14336),
    "qwen15_moe_a27b": GroupedMatmulShape(32768, 60, 2048, 1408),
    "jetmoe_8b": GroupedMatmulShape(16384, 8, 2048, 5632),
    "mixtral_8x7b_decode": GroupedMatmulShape(128, 8, 4096, 14336),
}
"""Name -> sizes; each is a published model's, or this repository's own recipe's."""
