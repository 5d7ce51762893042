"""NF4: 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314), code for code as in
bitsandbytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from weights import lut
from weights.lut import Lut

TABLE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What codes 0 … 15 stand for."""


def quantize(w: jax.Array, block: int = 64, *, double: bool = False) -> Lut:
    """Round `w [K, N]` to NF4 in blocks of `block` inputs; `double` codes the blocks' scales again,
    in 8 bits.
    """
    return lut.quantize(w, jnp.asarray(TABLE), block, double=double)
