"""How a weight codes its input: the activation half of W8A8 and of every narrower pair.

    code = clip(round(x / scale) + zero, lowest, highest)        half to even
    x   ~= scale * (code - zero)

What a layer multiplies by includes how its input is coded, so a weight format carries an
`ActQuant`. Gradients pass as if nothing were rounded; where a range is given, only within it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.int8_matmul import quantize_rows

Array = jax.Array
MODES = ("token", "tensor", "static")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero"],
    meta_fields=["bits", "mode", "symmetric", "clip"],
)
@dataclass(frozen=True)
class ActQuant:
    """A coding of the input.

    scale: float32[] of "static", from calibration; None otherwise.
    zero: float32[] of an asymmetric "static" coding, in 0 .. 2**bits - 1; None otherwise.
    bits: of a code, 2 to 8.
    mode: "token": a range for each row, found at run time; "tensor": one for all; "static": given.
    symmetric: `2**bits - 1` levels around 0 (absmax), or all `2**bits` from smallest to largest, 0
        included.
    clip: share of the found range that is kept, 0 to 1; None is all.
    """

    scale: Array | None = None
    zero: Array | None = None
    bits: int = 8
    mode: str = "token"
    symmetric: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"ActQuant mode={self.mode!r} is not one of {', '.join(MODES)}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"ActQuant bits={self.bits!r}; codes have 2 to 8 bits")

    def codes(self, x: Array) -> tuple[Array, Array, Array | None]:
        """`[..., K]` as `int8[..., K]`, scales `float32[...]` and zeros (None: 0); codes and zeros
        of an asymmetric coding are less `2**(bits-1)`.
        """
        if self.symmetric and self.bits == 8 and self.mode == "token" and self.clip is None:
            codes, scale, _ = quantize_rows(x)
            return codes, scale, None
        scale, zero = self._range(x.astype(jnp.float32))
        codes = jnp.round(x.astype(jnp.float32) / scale[..., None])
        if zero is None:
            most = 2 ** (self.bits - 1) - 1
            return jnp.clip(codes, -most, most).astype(jnp.int8), scale, None
        half = 2 ** (self.bits - 1)
        codes = jnp.clip(codes + zero[..., None], -half, half - 1)
        return codes.astype(jnp.int8), scale, zero

    def _range(self, x: Array) -> tuple[Array, Array | None]:
        """Scale and shifted zero `[...]` of each row."""
        rows, half = x.shape[:-1], 2 ** (self.bits - 1)
        if (self.mode == "static") != (self.scale is not None):
            raise ValueError(f"ActQuant mode={self.mode!r}: a scale is given for 'static' only")
        if self.scale is not None:
            zero = None if self.symmetric else jnp.zeros(()) if self.zero is None else self.zero
            zero = None if zero is None else jnp.broadcast_to(zero - half, rows)
            return jnp.broadcast_to(self.scale, rows), zero
        share = 1.0 if self.clip is None else self.clip
        axes = (-1,) if self.mode == "token" else tuple(range(x.ndim))
        low = jnp.min(x, axis=axes, keepdims=True, initial=0.0) * share
        high = jnp.max(x, axis=axes, keepdims=True, initial=0.0) * share
        most = jnp.maximum(-low, high)
        if self.symmetric:
            scale = jnp.where(most == 0, 1.0, most / (half - 1))
            return jnp.broadcast_to(scale[..., 0], rows), None
        scale = jnp.where(most == 0, 1.0, (high - low) / (2 * half - 1))
        zero = jnp.round(-low / scale) - half
        return jnp.broadcast_to(scale[..., 0], rows), jnp.broadcast_to(zero[..., 0], rows)

    def inside(self, x: Array) -> Array | None:
        """Where gradients pass, `bool[..., K]`; None is everywhere."""
        if self.mode != "static" and self.clip is None:
            return None
        scale, zero = self._range(x.astype(jnp.float32))
        half = 2 ** (self.bits - 1)
        low, high = (1 - half, half - 1) if zero is None else (-half, half - 1)
        shift = jnp.zeros_like(scale) if zero is None else zero
        places = x.astype(jnp.float32) / scale[..., None] + shift[..., None]
        return (places >= low - 0.5) & (places <= high + 0.5)

    def fake(self, x: Array) -> Array:
        """`x` coded and decoded, in `x.dtype`: what a product in floating point would see."""
        codes, scale, zero = self.codes(x)
        shifted = codes.astype(jnp.float32) - (0.0 if zero is None else zero[..., None])
        return (shifted * scale[..., None]).astype(x.dtype)
