"""Adapters: small trainable parts beside frozen weights, and their files.

params = attach(params, LoRA(rank=8), jax.random.key(0))
params = merge(params)
"""

from model.peft import AdapterFileError, load_peft, save_peft
from surgery.adapt.lora import (
    LoRA,
    adapters,
    attach,
    count_adapter_parameters,
    merge,
    unmerge,
    without_adapters,
)

__all__ = [
    "AdapterFileError",
    "LoRA",
    "adapters",
    "attach",
    "count_adapter_parameters",
    "load_peft",
    "merge",
    "save_peft",
    "unmerge",
    "without_adapters",
]
