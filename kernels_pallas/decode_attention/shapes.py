"""Realistic argument shapes of decode attention, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one call: q `[batch, queries, heads, head_dim]`, k and v `[batch, kv_heads, slots,
    head_dim]`, all slots in use.
    """

    batch: int
    queries: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: int = 0


SHAPES: dict[str, DecodeShape] = {
    "quickstart": DecodeShape(4, 1, 256, 6, 2, 64),
    "llama2_7b": DecodeShape(16, 1, 4096, 32, 32, 128),
    "llama3_8b": DecodeShape(64, 1, 4096, 32, 8, 128),
    "llama3_8b_long": DecodeShape(1, 1, 131072, 32, 8, 128),
    "llama3_8b_verify": DecodeShape(64, 4, 4096, 32, 8, 128),
    "mistral_7b": DecodeShape(16, 1, 16384, 32, 8, 128, window=4096),
    "lm_infinite": DecodeShape(16, 1, 16384, 32, 8, 128, window=4096, sinks=16),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
