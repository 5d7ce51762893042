"""The methods of `python -m surgery`, by name."""

from __future__ import annotations

from surgery.quantize.awq import AWQ
from surgery.quantize.finequant import FineQuant
from surgery.quantize.gptq import GPTQ
from surgery.quantize.llm_int8 import LLMInt8
from surgery.quantize.method import Method
from surgery.quantize.rtn import Float4, NormalFloat4, RoundToNearest
from surgery.quantize.smoothquant import SmoothQuant

METHODS: dict[str, type[Method]] = {
    "rtn": RoundToNearest,
    "nf4": NormalFloat4,
    "fp4": Float4,
    "finequant": FineQuant,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "int8": LLMInt8,
}
"""Name -> dataclass of settings, each with a function from a matrix to a weight format."""
