"""Pages of keys and values in few bits: the layouts, and what quantizes into them.

int8 (`Int8Pages`): each token of each kv head is a vector of signed bytes with a float32 scale,
`x' = scale * code`.

2 or 4 bits (`KiviPages`, KIVI, arXiv 2402.02750): codes count up from the least of a group,
`x' = scale * code + zero`. Keys have outlier channels, so a group of keys is `group` consecutive
tokens of one channel; values have none, so a group of values is `group` channels of one token.

    keys, one head of one page             values, the same

            channels ->                            channels ->
    tokens  a  b  c  d  e  f  g  h         tokens  p  p  p  p  q  q  q  q
      |     a  b  c  d  e  f  g  h           |     r  r  r  r  s  s  s  s
      v     a  b  c  d  e  f  g  h           v     t  t  t  t  u  u  u  u
            i  j  k  l  m  n  o  p                 v  v  v  v  w  w  w  w

    (one letter: one scale and zero; group = 3 tokens, 4 channels)

Codes of both are packed along the tokens, `32 / bits` in a word. The page is cut into as many
stretches of equal length; word w holds the w-th token of each, the first in the lowest bits:

    2 bits, a page of 128 tokens: 16 stretches of 8 tokens, 8 words a channel
    word w   bits 0-1: token w   2-3: token 8 + w   4-5: token 16 + w   ...   30-31: token 120 + w

so that one shift and mask of all words gives a stretch of tokens, in their order, with nothing to
move. Channels are the last axis: on a TPU they fill the lanes, and the 8 words the sublanes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
BITS = (2, 4)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Pages:
    """keys, values: `int8[layers, pages, kv_heads, page_size, dim]`. key_scales, value_scales:
    `float32[layers, pages, kv_heads, page_size]`.
    """

    keys: Array
    key_scales: Array
    values: Array
    value_scales: Array

    @staticmethod
    def empty(layers: int, pages: int, kv_heads: int, page_size: int, dim: int) -> Int8Pages:
        """Pages of zeros."""
        lead = (layers, pages, kv_heads, page_size)
        codes, scales = jnp.zeros((*lead, dim), jnp.int8), jnp.zeros(lead, jnp.float32)
        return Int8Pages(codes, scales, codes, scales)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[3]

    def write(self, layer: Any, slots: Array, k: Array, v: Array) -> Int8Pages:
        """With tokens k and v `[tokens, kv_heads, dim]` in slots `int32[tokens]`, which are `page *
        page_size + offset`; slot -1 is dropped.
        """
        at = _page_and_offset(slots, self.page_size, self.keys.shape[1])
        return dataclasses.replace(
            self,
            **{
                name: getattr(self, name).at[layer, at[0], :, at[1]].set(new, mode="drop")
                for x, names in ((k, ("keys", "key_scales")), (v, ("values", "value_scales")))
                for name, new in zip(names, quantize_int8(x), strict=True)
            },
        )

    def read(self, layer: Any, numbers: Array) -> tuple[Array, Array]:
        """Keys and values of pages `[...]`, float32 `[..., kv_heads, page_size, dim]`."""
        pairs = ((self.keys, self.key_scales), (self.values, self.value_scales))
        k, v = (
            codes[layer, numbers].astype(jnp.float32) * scales[layer, numbers][..., None]
            for codes, scales in pairs
        )
        return k, v


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KiviPages:
    """keys, values: `int32[layers, pages, kv_heads, page_size * bits / 32, dim]`, packed.

    key_grid: `[layers, pages, kv_heads, 2, page_size / group, dim]`, scales and zeros. value_grid:
    `[layers, pages, kv_heads, 2, dim / group, page_size]`.
    """

    keys: Array
    key_grid: Array
    values: Array
    value_grid: Array
    bits: int = field(metadata={"static": True})
    group: int = field(metadata={"static": True})

    @staticmethod
    def empty(
        layers: int,
        pages: int,
        kv_heads: int,
        page_size: int,
        dim: int,
        *,
        bits: int = 2,
        group: int = 32,
        dtype: Any = jnp.bfloat16,
    ) -> KiviPages:
        """Pages of zeros; scales and zeros in `dtype`. Raises `ValueError` for sizes that do not
        divide.
        """
        check_kivi(page_size, dim, bits, group)
        lead = (layers, pages, kv_heads)
        words = jnp.zeros((*lead, page_size * bits // 32, dim), jnp.int32)
        return KiviPages(
            words,
            jnp.zeros((*lead, 2, page_size // group, dim), dtype),
            words,
            jnp.zeros((*lead, 2, dim // group, page_size), dtype),
            bits,
            group,
        )

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.value_grid.shape[-1]

    def write(self, layer: Any, numbers: Array, k: Array, v: Array) -> KiviPages:
        """With whole pages k and v `[count, kv_heads, page_size, dim]` as pages `int32[count]`;
        page -1 is dropped. Keys are stored as they come: rotate them first.
        """
        numbers = jnp.where(numbers < 0, self.keys.shape[1], numbers)
        dtype = self.key_grid.dtype
        keys, key_grid = quantize_groups(k, self.bits, self.group, -2, dtype)
        values, value_grid = quantize_groups(v, self.bits, self.group, -1, dtype)
        new = {
            "keys": pack(keys, self.bits),
            "key_grid": key_grid,
            "values": pack(values, self.bits),
            "value_grid": jnp.swapaxes(value_grid, -1, -2),
        }
        return dataclasses.replace(
            self,
            **{
                name: getattr(self, name).at[layer, numbers].set(array, mode="drop")
                for name, array in new.items()
            },
        )

    def read(self, layer: Any, numbers: Array) -> tuple[Array, Array]:
        """Keys and values of pages `[...]`, float32 `[..., kv_heads, page_size, dim]`."""
        k, k_grid, v, v_grid = (
            array[layer, numbers]
            for array in (self.keys, self.key_grid, self.values, self.value_grid)
        )
        k = dequantize_groups(unpack(k, self.bits), k_grid, -2)
        v = dequantize_groups(unpack(v, self.bits), jnp.swapaxes(v_grid, -1, -2), -1)
        return k, v


QuantizedPages = Int8Pages | KiviPages


def quantize_int8(x: Array) -> tuple[Array, Array]:
    """`[..., dim]` -> `int8[..., dim]` and `float32[...]`, the scale `max|x| / 127` of each vector;
    vectors of zeros have scale 0.
    """
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127
    safe = jnp.where(scales > 0, scales, 1.0)[..., None]
    return jnp.clip(jnp.round(x / safe), -127, 127).astype(jnp.int8), scales


def quantize_groups(
    x: Array, bits: int, group: int, axis: int, dtype: Any = jnp.float32
) -> tuple[Array, Array]:
    """Codes 0..2^bits-1 of groups of neighbours along an axis (KIVI, section 3.1).

    Args:
        x: `[..., n, m]`.
        bits: of a code.
        group: neighbours that share a scale and a zero.
        axis: -1 or -2.
        dtype: of scales and zeros; codes are of what these come to after rounding.

    Returns:
        `int32[..., n, m]` and `dtype[..., 2, n, m]` with the axis divided by `group`: scales, then
        zeros (the least of each group). A group of equal numbers has scale 1 and codes 0.
    """
    split = _split(x.astype(jnp.float32), group, axis)
    low, high = (reduce(split, axis=axis, keepdims=True) for reduce in (jnp.min, jnp.max))
    scale = ((high - low) / (2**bits - 1)).astype(dtype).astype(jnp.float32)
    scale = jnp.where(scale > 0, scale, 1.0)
    zero = low.astype(dtype).astype(jnp.float32)
    codes = jnp.clip(jnp.round((split - zero) / scale), 0, 2**bits - 1).astype(jnp.int32)
    grid = jnp.stack([jnp.squeeze(part, axis) for part in (scale, zero)], axis=-3)
    return codes.reshape(x.shape), grid.astype(dtype)


def dequantize_groups(codes: Array, grid: Array, axis: int) -> Array:
    """float32 `[..., n, m]` of codes and of `quantize_groups`' scales and zeros."""
    scale, zero = (
        jnp.expand_dims(jnp.take(grid, index, axis=-3).astype(jnp.float32), axis)
        for index in (0, 1)
    )
    group = codes.shape[axis] // grid.shape[axis]
    split = _split(codes.astype(jnp.float32), group, axis)
    return (split * scale + zero).reshape(codes.shape)


def pack(codes: Array, bits: int) -> Array:
    """`int32[..., tokens, dim]` -> `int32[..., tokens * bits / 32, dim]`, as the picture above."""
    count = 32 // bits
    *lead, tokens, dim = codes.shape
    stretches = codes.astype(jnp.uint32).reshape(*lead, count, tokens // count, dim)
    shifts = (bits * jnp.arange(count, dtype=jnp.uint32))[:, None, None]
    words = jnp.sum(stretches << shifts, axis=-3, dtype=jnp.uint32)  # no two share a bit
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: Array, bits: int) -> Array:
    """`int32[..., words, dim]` -> codes `int32[..., words * 32 / bits, dim]`."""
    count = 32 // bits
    shifts = (bits * jnp.arange(count, dtype=jnp.int32))[:, None, None]
    codes = (words[..., None, :, :] >> shifts) & (2**bits - 1)
    return codes.reshape(*words.shape[:-2], count * words.shape[-2], words.shape[-1])


def check_kivi(page_size: int, dim: int, bits: int, group: int) -> None:
    """Raises `ValueError` that names the numbers that do not fit."""
    if bits not in BITS:
        raise ValueError(f"bits={bits}; keys and values of {BITS[0]} or {BITS[1]} bits")
    for name, size, unit in (
        ("page_size", page_size, group),
        ("dim", dim, group),
        ("page_size", page_size, 32 // bits),
    ):
        if size % unit:
            what = "group" if unit == group else f"{32 // bits} codes of a word of {bits} bits each"
            raise ValueError(f"{name}={size} is not a multiple of {what}={unit}")


def _split(x: Array, group: int, axis: int) -> Array:
    """The axis as groups and what is in them; the latter keeps the axis's place from the end."""
    at = x.ndim + axis
    shape = (*x.shape[:at], x.shape[at] // group, group, *x.shape[at + 1 :])
    return x.reshape(shape)


def _page_and_offset(slots: Array, size: int, pages: int) -> tuple[Array, Array]:
    return jnp.where(slots < 0, pages, slots // size), slots % size
