"""Block sizes: measured on a device, kept on disk, looked up while a kernel is traced.

A kernel calls `best(Key.of(...), default)` and gets what was measured for its shape, or what it
handed in; nothing is ever measured there. `python -m kernels_pallas tune` measures (`measure`), for
the kernels of `kernels`, and `use` sets block sizes by hand.
"""

from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.lookup import best, use

__all__ = ["Key", "best", "use"]
