"""Realistic argument shapes of shared-prefix attention, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SharedPrefixShape:
    """Sizes of one decoding step: one group of `members` sequences, `prefix` tokens alike and
    `suffix` of their own, in pages of `page_size`.
    """

    members: int
    prefix: int
    suffix: int
    page_size: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES: dict[str, SharedPrefixShape] = {
    "quickstart": SharedPrefixShape(8, 128, 32, 16, 6, 2, 64),
    "llama3_8b_system_prompt": SharedPrefixShape(64, 2048, 256, 16, 32, 8, 128),
    "llama3_8b_few_shot": SharedPrefixShape(256, 8192, 128, 16, 32, 8, 128),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
