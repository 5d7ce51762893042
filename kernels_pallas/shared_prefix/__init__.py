"""Attention of sequences that begin alike, whose beginning is read once."""

from kernels_pallas.shared_prefix.api import IMPLEMENTATIONS, shared_prefix_attention
from kernels_pallas.shared_prefix.reference import Groups
from kernels_pallas.shared_prefix.shapes import SHAPES, SharedPrefixShape

__all__ = ["IMPLEMENTATIONS", "SHAPES", "Groups", "SharedPrefixShape", "shared_prefix_attention"]
