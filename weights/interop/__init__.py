"""One linear layer in the file layouts of others: GPTQ, AWQ, bitsandbytes.

`read(arrays, config) -> weight` and `write(weight) -> (arrays, config)`, where `arrays` are those
of one module under their last names (`qweight`, `scales`, …) and `config` is the
`quantization_config` of `config.json`. Names of modules are the business of `model.families`.
"""

from weights.interop import awq, bitsandbytes, gptq
from weights.interop.layout import LayoutError

__all__ = ["LayoutError", "awq", "bitsandbytes", "gptq"]
