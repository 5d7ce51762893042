"""Everything a layer can multiply by (seam 1).

A weight is an array, or a registered pytree dataclass that follows `weights.protocol.Weight`.
Models call `linear`, `matmul`, `embed` and `unembed` and never ask which it is; quantizers,
pruners and adapters add formats as files of this folder and one line in `FORMATS`.
"""

from weights.experts import OfLayer, grouped_matmul
from weights.layers import bias_add, embed, linear, matmul, unembed
from weights.protocol import Weight, dequantize, is_format, is_weight, nbytes, prepare, specs
from weights.serial import FORMATS, from_arrays, to_arrays
from weights.tree import Path, flatten, from_flat, map_with_path, nearest, path_string, paths

__all__ = [
    "FORMATS",
    "OfLayer",
    "Path",
    "Weight",
    "bias_add",
    "dequantize",
    "embed",
    "flatten",
    "from_arrays",
    "from_flat",
    "grouped_matmul",
    "is_format",
    "is_weight",
    "linear",
    "map_with_path",
    "matmul",
    "nbytes",
    "nearest",
    "path_string",
    "paths",
    "prepare",
    "specs",
    "to_arrays",
    "unembed",
]
