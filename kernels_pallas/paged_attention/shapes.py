"""Realistic argument shapes of paged attention, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PagedShape:
    """Sizes of one step: `decoding` sequences of one token and `prompts` of `prompt_tokens` each,
    all of `length` tokens in pages of `page_size`.
    """

    decoding: int
    prompts: int
    prompt_tokens: int
    length: int
    page_size: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def sequences(self) -> int:
        """Of both kinds."""
        return self.decoding + self.prompts

    @property
    def tokens(self) -> int:
        """Of the step."""
        return self.decoding + self.prompts * self.prompt_tokens


SHAPES: dict[str, PagedShape] = {
    "quickstart": PagedShape(4, 0, 0, 256, 16, 6, 2, 64),
    "llama3_8b_decode": PagedShape(64, 0, 0, 4096, 16, 32, 8, 128),
    "llama3_8b_large_pages": PagedShape(64, 0, 0, 4096, 128, 32, 8, 128),
    "llama3_8b_prompt": PagedShape(0, 1, 2048, 2048, 16, 32, 8, 128),
    "llama3_8b_mixed": PagedShape(48, 2, 1000, 4096, 16, 32, 8, 128),
    "llama2_7b_decode": PagedShape(16, 0, 0, 4096, 16, 32, 32, 128),
}
"""Name -> sizes; each is a published model's, or this repository's own quickstart."""
