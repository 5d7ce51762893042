"""Attention of a step of mixed prompts and decoding sequences to keys and values in pages."""

from kernels_pallas.paged_attention.api import IMPLEMENTATIONS, append, paged_attention
from kernels_pallas.paged_attention.shapes import SHAPES, PagedShape

__all__ = ["IMPLEMENTATIONS", "SHAPES", "PagedShape", "append", "paged_attention"]
