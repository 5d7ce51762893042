"""Everything a layer can multiply by (seam 1).

A weight is an array, or a registered pytree dataclass that follows `weights.protocol.Weight`.
Models call `linear`, `matmul`, `embed` and `unembed` and never ask which it is; quantizers,
pruners and adapters add formats as files of this folder and one line in `FORMATS`. The functions
that make a format stand beside it: `grouped.quantize`, `int8.quantize`, `normal_float.quantize`.
"""

from weights.act_quant import ActQuant
from weights.codebook import Codebook
from weights.experts import OfLayer, grouped_matmul
from weights.grouped import Grouped
from weights.int8 import Int8, Outlier
from weights.layers import bias_add, embed, linear, lookup, matmul, matmul_transposed, unembed
from weights.low_rank import LowRank
from weights.low_rank_bank import LowRankBank
from weights.lut import Lut
from weights.mixed import Mixed
from weights.permuted import Permuted
from weights.protocol import (
    Weight,
    bits_per_weight,
    check_split,
    dequantize,
    describe,
    is_format,
    is_weight,
    nbytes,
    nominal_bits,
    prepare,
    runtime_nbytes,
    separable,
    size,
    specs,
    split_units,
)
from weights.second_order import SecondOrder
from weights.serial import FORMATS, from_arrays, to_arrays
from weights.sparse_outlier import SparseOutlier
from weights.stacking import stack, trimmed, unstack
from weights.tree import Path, flatten, from_flat, map_with_path, nearest, path_string, paths

__all__ = [
    "FORMATS",
    "ActQuant",
    "Codebook",
    "Grouped",
    "Int8",
    "LowRank",
    "LowRankBank",
    "Lut",
    "Mixed",
    "OfLayer",
    "Outlier",
    "Path",
    "Permuted",
    "SecondOrder",
    "SparseOutlier",
    "Weight",
    "bias_add",
    "bits_per_weight",
    "check_split",
    "dequantize",
    "describe",
    "embed",
    "flatten",
    "from_arrays",
    "from_flat",
    "grouped_matmul",
    "is_format",
    "is_weight",
    "linear",
    "lookup",
    "map_with_path",
    "matmul",
    "matmul_transposed",
    "nbytes",
    "nearest",
    "nominal_bits",
    "path_string",
    "paths",
    "prepare",
    "runtime_nbytes",
    "separable",
    "size",
    "specs",
    "split_units",
    "stack",
    "to_arrays",
    "trimmed",
    "unembed",
    "unstack",
]
