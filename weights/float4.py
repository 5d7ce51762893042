"""FP4 as bitsandbytes has it: a sign and eight magnitudes, the smallest 1/192 of the largest. It is
not E2M1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from weights import lut
from weights.grid import nearest_codes
from weights.lut import Lut

MAGNITUDES: tuple[float, ...] = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
"""What codes 0 … 7 stand for; bit 3 is the sign."""


def table() -> jax.Array:
    """`float32[16]`, what each code stands for."""
    magnitudes = jnp.asarray(MAGNITUDES, jnp.float32)
    return jnp.concatenate([magnitudes, -magnitudes])


def quantize(w: jax.Array, block: int = 64, *, double: bool = False) -> Lut:
    """Round `w [K, N]` to FP4 in blocks of `block` inputs; `double` codes the blocks' scales again,
    in 8 bits.
    """
    return lut.scaled(w, table(), _encode, block, double)


def _encode(values: jax.Array) -> jax.Array:
    """The nearest magnitude, in the middle of two the smaller; then the sign, also of a zero."""
    magnitudes = jnp.asarray(MAGNITUDES, jnp.float32)
    order = jnp.argsort(magnitudes)
    codes = order[nearest_codes(jnp.abs(values), magnitudes[order])]
    return codes + 8 * (values < 0)
