"""Realistic argument shapes of attention to quantized pages, shared by tests, benchmarks and
tuning.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizedShape:
    """Sizes of one decoding step: `batch` sequences of `length` tokens. bits: 8, 4 or 2."""

    batch: int
    queries: int
    length: int
    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    bits: int


SHAPES: dict[str, QuantizedShape] = {
    "quickstart": QuantizedShape(4, 1, 256, 128, 6, 2, 128, 8),
    "llama3_8b_8bit": QuantizedShape(64, 1, 4096, 128, 32, 8, 128, 8),
    "llama3_8b_4bit": QuantizedShape(64, 1, 4096, 128, 32, 8, 128, 4),
    "llama3_8b_2bit": QuantizedShape(64, 1, 4096, 128, 32, 8, 128, 2),
    "llama2_7b_2bit": QuantizedShape(16, 1, 4096, 128, 32, 32, 128, 2),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
