"""The few operations worth a kernel: a folder each, with the same file names in every folder.

`reference.py` is the plain `jax.numpy` definition, which is also what runs on a CPU; `api.py` picks
an implementation by name; `shapes.py` holds the realistic argument shapes that tests, benchmarks
and tuning share. Knows nothing of models.
"""

from kernels_pallas.attention import IMPLEMENTATIONS as ATTENTION_IMPLEMENTATIONS
from kernels_pallas.attention import attention, merge

__all__ = ["ATTENTION_IMPLEMENTATIONS", "attention", "merge"]
