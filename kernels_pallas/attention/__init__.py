"""Attention with a log-sum-exp output, and the merge of partial attentions."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, attention
from kernels_pallas.attention.reference import mask, merge
from kernels_pallas.attention.shapes import SHAPES, AttentionShape

__all__ = ["IMPLEMENTATIONS", "SHAPES", "AttentionShape", "attention", "mask", "merge"]
