"""Realistic argument shapes of attention, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one call: q `[batch, queries, heads, head_dim]`, k and v `[batch, keys, kv_heads,
    head_dim]`.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: int = 0


SHAPES: dict[str, AttentionShape] = {
    "quickstart": AttentionShape(8, 256, 256, 6, 2, 64),
    "gpt2": AttentionShape(8, 1024, 1024, 12, 12, 64),
    "llama3_8b": AttentionShape(1, 8192, 8192, 32, 8, 128),
    "mistral_7b": AttentionShape(1, 16384, 16384, 32, 8, 128, window=4096),
    "mistral_7b_streaming": AttentionShape(1, 32768, 32768, 32, 8, 128, window=4096, sinks=64),
    "llama3_8b_decode": AttentionShape(64, 1, 4096, 32, 8, 128),
    "llama3_8b_chunk": AttentionShape(4, 512, 4096, 32, 8, 128),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
