"""Codes of 2 to 8 bits with a scale, and perhaps a zero, for each group of inputs of an output.

    W[k, n] = scale[g, n] * (code[k, n] - zero[g, n]),   g = k // group

Zeros may be real numbers. Without zeros, codes stand around the middle, `2 ** (bits - 1)`. This is
what round-to-nearest, GPTQ and AWQ leave behind; scales and zeros may be coded again
(`weights.second_order`).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas.quantized_matmul import pack, quantized_matmul
from weights import codes as code_forms
from weights import grid as grids
from weights.grid import Grid
from weights.second_order import SecondOrder, slot_specs, values_of, whole

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero"],
    meta_fields=["bits", "group", "shape", "form", "stored"],
)
@dataclass(frozen=True)
class Grouped(code_forms.InGroups):
    """A matrix `[K, N]` of codes in groups.

    codes: `uint32[packed_rows(K, bits), N]`, the stored form "words"; or "elements" `[K, N]`, uint8
        with zeros, int8 less the middle without.
    scale: `[K / group, N]`, any float type, or a `SecondOrder`.
    zero: the same, or None.
    bits, group, shape: of a code; inputs of a group; `(K, N)`.
    form: how the codes lie.
    stored: bytes of one matrix in its stored form, where this is another.
    """

    codes: Array
    scale: Any
    zero: Any
    bits: int
    group: int
    shape: tuple[int, int]
    form: str = code_forms.WORDS
    stored: int | None = None

    def _product(self, x: Array, transposed: bool = False) -> Array:
        scale, zero = values_of(self.scale), values_of(self.zero)
        rows = self.shape[0] if transposed else None
        return quantized_matmul(
            x,
            self.codes,
            scale,
            zero,
            bits=self.bits,
            group=self.group,
            transposed=transposed,
            rows=rows,
        )

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        found = code_forms.code_rows(self.codes, self.form, self.bits, ids)
        g = jnp.clip(ids // self.group, 0, self.groups - 1)
        scale = jnp.take(values_of(self.scale), g, axis=0).astype(jnp.float32)
        zero = self._center if self.zero is None else jnp.take(values_of(self.zero), g, axis=0)
        known = (ids >= 0) & (ids < self.shape[0])
        return jnp.where(known[..., None], scale * (found.astype(jnp.float32) - zero), 0.0)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        codes = code_forms.elements(self.codes, self.form, self.bits, self.shape[0])
        scale = values_of(self.scale)
        zero = values_of(self.zero)
        zero = (
            jnp.full((), self._center) if zero is None else zero.astype(jnp.float32)[..., None, :]
        )
        by_group = codes.reshape(*codes.shape[:-2], self.groups, self.group, self.shape[1])
        values = (by_group.astype(jnp.float32) - zero) * scale.astype(jnp.float32)[..., None, :]
        return values.reshape(codes.shape).astype(dtype)

    @property
    def _center(self) -> float:
        """What an element less than its code is, where there are no zeros."""
        return 0.0 if self.form == code_forms.ELEMENTS else 2.0 ** (self.bits - 1)

    def prepare(self, backend: str) -> Grouped:
        """Scales and zeros spread out; on a CPU codes one an element, unless 4 bits in words are
        as fast.
        """
        ready = dataclasses.replace(self, scale=values_of(self.scale), zero=values_of(self.zero))
        if backend == "cpu" and self.form == code_forms.WORDS and self.bits != 4:
            codes = code_forms.elements(self.codes, self.form, self.bits, self.shape[0])
            if self.zero is None:
                codes = (codes.astype(jnp.int16) - 2 ** (self.bits - 1)).astype(jnp.int8)
            ready = dataclasses.replace(ready, codes=codes, form=code_forms.ELEMENTS)
        return dataclasses.replace(ready, stored=self.nbytes() // self.matrices)

    def specs(self, spec: PartitionSpec) -> Grouped:
        """Codes, scales and zeros are split as the matrix, on their own smaller axes."""
        by_group = code_forms.group_spec(spec, self.groups)
        return dataclasses.replace(
            self,
            codes=PartitionSpec(*code_forms.matrix_axes(spec)),
            scale=slot_specs(self.scale, by_group),
            zero=slot_specs(self.zero, by_group),
        )


def from_codes(
    codes: Array, scale: Any, zero: Any = None, *, bits: int, group: int = -1
) -> Grouped:
    """The format of codes `[K, N]` that were found elsewhere (GPTQ, an imported file).

    Args:
        codes: whole numbers 0 .. 2**bits - 1.
        scale: `[K / group, N]`, kept in its type, or a `SecondOrder`.
        zero: the same; of a whole-number type it is packed in `bits` bits; None: the middle.
        bits: 2 to 8.
        group: -1 is all inputs.
    """
    rows, columns = codes.shape
    group = code_forms.group_size(group, rows)
    code_forms.check_by_group((rows, columns), group, scale=scale, zero=zero)
    if zero is not None and not isinstance(zero, SecondOrder):
        zero = whole(zero, bits) if jnp.issubdtype(zero.dtype, jnp.integer) else zero
    return Grouped(pack(codes, bits), scale, zero, bits, group, (rows, columns))


def codes_of(weight: Grouped) -> Array:
    """The codes `uint8[..., K, N]`, whatever form they lie in."""
    codes = code_forms.elements(weight.codes, weight.form, weight.bits, weight.shape[0])
    if weight.form == code_forms.ELEMENTS and weight.zero is None:
        codes = codes.astype(jnp.int16) + 2 ** (weight.bits - 1)
    return codes.astype(jnp.uint8)


def quantize(
    w: Array,
    bits: int = 4,
    group: int = 128,
    *,
    symmetric: bool = False,
    scale: Array | None = None,
    zero: Array | None = None,
    grid: Grid | None = None,
    shrink: bool = False,
    scale_dtype: Any = jnp.float16,
) -> Grouped:
    """Round `w [K, N]` to the nearest codes.

    Args:
        w: float; K is a multiple of `group`.
        bits: 2 to 8.
        group: inputs that share a scale; -1 is all.
        symmetric: around 0, with `2 ** bits` levels and no zeros; else from the smallest to the
            largest, 0 included, with whole zeros packed in `bits` bits.
        scale, zero: `[K / group, N]`, given; None: fitted. Zeros are rounded and packed where the
            grid has whole ones within the codes.
        grid: conventions of their own (`weights.grid`), in the place of `bits` and `symmetric`.
        shrink: search the range that loses least (`grid.fit_shrunk`).
        scale_dtype: of fitted scales and real zeros; codes are those of the rounded ones.
    """
    grid = grid or Grid(bits, "even" if symmetric else "none")
    group = code_forms.group_size(group, w.shape[0])
    by_group = w.reshape(-1, group, w.shape[1])
    if scale is None:
        fit = grids.fit_shrunk if shrink else grids.fit_minmax
        found, zero = fit(by_group, grid)
        scale = _stored_scale(found, scale_dtype)
    zero = jnp.full(scale.shape, grid.middle) if zero is None else zero
    packs = grid.whole_zero and (grid.include_zero or grid.clip_zero)
    if packs:
        zero = jnp.clip(jnp.round(zero), 0, grid.highest).astype(jnp.uint8)
    else:
        zero = zero.astype(scale_dtype)
    codes = grids.encode(by_group, scale, zero, grid).reshape(w.shape)
    kept = None if grid.symmetry != "none" else zero
    return from_codes(codes, scale, kept, bits=grid.bits, group=group)


def _stored_scale(scale: Array, dtype: Any) -> Array:
    """Rounded to its type, never to 0 or infinity."""
    limits = jnp.finfo(dtype)
    least = max(float(limits.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    return jnp.clip(scale, least, float(limits.max)).astype(dtype)
