"""Attention with a log-sum-exp output, and the merge of partial attentions."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, attention
from kernels_pallas.attention.flash import RESIDUALS
from kernels_pallas.attention.reference import mask, merge
from kernels_pallas.attention.shapes import SHAPES, AttentionShape
from kernels_pallas.attention.visits import sees_anything

__all__ = [
    "IMPLEMENTATIONS",
    "RESIDUALS",
    "SHAPES",
    "AttentionShape",
    "attention",
    "mask",
    "merge",
    "sees_anything",
]
