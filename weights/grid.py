"""Uniform grids: the scale and zero of a group of values, their codes, and what those stand for.

    code  = clip(round(w / scale) + zero, lowest, highest)        half to even
    value = scale * (code - zero)

Published methods differ in details that change their results; here each is a named flag of `Grid`,
and `CONVENTIONS` says which method sets which. Values lie `[..., group, N]`: a group runs along the
next to last axis, and each of the N columns has a scale and a zero of its own, `[..., N]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

SYMMETRIES = ("none", "even", "odd")
SHRINK_STEPS = 80
"""Ranges tried by `fit_shrunk`: 100 %, 99 %, … of the values' own."""
SHRINK_EXPONENT = 2.4
"""Of the absolute error that it minimises."""


@dataclass(frozen=True)
class Grid:
    """What a code of `bits` bits may stand for; codes are 0 .. 2**bits - 1.

    bits: of a code, 2 to 8.
    symmetry: "none": the range is that of the values. "even": all 2**bits levels, zero in the
        middle at code `2**(bits-1)`, so one more below than above. "odd": `2**bits - 1` levels,
        the same on both sides (absmax / (2**(bits-1) - 1)).
    include_zero: stretch the range until it holds 0.
    whole_zero: round the zero to a whole number, so that the value 0 is exact.
    clip_zero: force the zero into the range of codes.
    constant: of a group whose values are all the same but not 0, where the range is not stretched:
        "exact" scales by the value itself, "unit" takes the range -1 .. 1.
    """

    bits: int = 4
    symmetry: str = "none"
    include_zero: bool = True
    whole_zero: bool = True
    clip_zero: bool = False
    constant: str = "exact"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r}; a grid has codes of 2 to 8 bits")
        _one_of("symmetry", self.symmetry, SYMMETRIES)
        _one_of("constant", self.constant, ("exact", "unit"))

    @property
    def lowest(self) -> int:
        """The smallest code in use."""
        return 1 if self.symmetry == "odd" else 0

    @property
    def highest(self) -> int:
        """The largest code in use."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)


CONVENTIONS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"constant": "unit"},
    "gptq_symmetric": {"symmetry": "even", "constant": "unit"},
    "spqr": {"include_zero": False, "constant": "unit"},
    "awq": {"include_zero": False, "clip_zero": True},
    "absmax": {"symmetry": "odd"},
    "real_zero": {"include_zero": False, "whole_zero": False},
}
"""Name of a convention -> flags of `Grid`. "absmax" is that of LLM.int8() and SmoothQuant; SliM-LLM
and PB-LLM follow "gptq".
"""


def convention(name: str, bits: int) -> Grid:
    """The grid of a published convention, a name in `CONVENTIONS`."""
    return Grid(bits, **CONVENTIONS[_one_of("convention", name, tuple(CONVENTIONS))])


def fit_range(low: Array, high: Array, grid: Grid) -> tuple[Array, Array]:
    """Scale and zero, float32, of values between `low` and `high`; a zero for symmetric grids too.

    Where all is 0 the range is -1 .. 1, which keeps 0 exact.
    """
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    if grid.symmetry != "none":
        return _symmetric(jnp.maximum(jnp.abs(low), jnp.abs(high)), grid)
    if grid.include_zero:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    constant, size = low == high, jnp.abs(high)
    unit = constant & ((size == 0) | (grid.constant == "unit"))
    low, high = jnp.where(unit, -1.0, low), jnp.where(unit, 1.0, high)
    scale = (high - low) / grid.highest
    zero = -low / jnp.where(constant & ~unit, 1.0, scale)
    zero = jnp.where(grid.whole_zero | unit, jnp.round(zero), zero)
    zero = jnp.clip(zero, 0, grid.highest) if grid.clip_zero else zero
    exact = constant & ~unit
    return jnp.where(exact, size, scale), jnp.where(exact, jnp.where(high > 0, 0.0, 1.0), zero)


def _symmetric(most: Array, grid: Grid) -> tuple[Array, Array]:
    most = jnp.where(most == 0, 1.0, most)
    even = grid.symmetry == "even"
    scale = 2 * most / grid.highest if even else most / (grid.middle - 1)
    return scale, jnp.full_like(scale, grid.middle)


def fit_minmax(w: Array, grid: Grid) -> tuple[Array, Array]:
    """Scale and zero `float32[..., N]` from the smallest and largest of `[..., group, N]`."""
    return fit_range(jnp.min(w, axis=-2), jnp.max(w, axis=-2), grid)


def fit_shrunk(
    w: Array, grid: Grid, *, steps: int = SHRINK_STEPS, exponent: float = SHRINK_EXPONENT
) -> tuple[Array, Array]:
    """Scale and zero whose range, `1 - i / 100` of the values' own with `i` below `steps`, loses
    least: `sum |decoded - w| ** exponent` (the search of GPTQ's authors).
    """
    low, high = jnp.min(w, axis=-2), jnp.max(w, axis=-2)
    if grid.symmetry == "none" and grid.include_zero:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)

    def attempt(best: tuple[Array, Array, Array], step: Array) -> tuple[Any, None]:
        share = 1 - step / 100
        scale, zero = fit_range(low * share, high * share, grid)
        off = jnp.abs(decode(encode(w, scale, zero, grid), scale, zero) - w.astype(jnp.float32))
        loss = jnp.sum(off**exponent, axis=-2)
        better = loss < best[0]
        chosen = (
            jnp.where(better, new, old) for new, old in zip((loss, scale, zero), best, strict=True)
        )
        return tuple(chosen), None

    scale, zero = fit_range(low, high, grid)
    start = (jnp.full_like(scale, jnp.inf), scale, zero)
    return jax.lax.scan(attempt, start, jnp.arange(steps, dtype=jnp.float32))[0][1:]


def encode(w: Array, scale: Array, zero: Array, grid: Grid) -> Array:
    """The nearest codes `uint8[..., group, N]` of `w [..., group, N]`, given `[..., N]` of each
    group.
    """
    scaled = w.astype(jnp.float32) / scale.astype(jnp.float32)[..., None, :]
    zero = zero.astype(jnp.float32)[..., None, :]
    codes = jnp.round(scaled) + zero if grid.whole_zero else jnp.round(scaled + zero)
    return jnp.clip(codes, grid.lowest, grid.highest).astype(jnp.uint8)


def decode(codes: Array, scale: Array, zero: Array) -> Array:
    """What codes stand for, `float32[..., group, N]`."""
    shifted = codes.astype(jnp.float32) - zero.astype(jnp.float32)[..., None, :]
    return shifted * scale.astype(jnp.float32)[..., None, :]


def nearest_codes(values: Array, table: Array) -> Array:
    """The codes `uint8[...]` of the entries of a sorted `table [entries]` nearest to `values`; in
    the middle of two, the lower.
    """
    middles = ((table[1:] + table[:-1]) / 2).astype(jnp.float32)
    return jnp.searchsorted(middles, values.astype(jnp.float32), side="left").astype(jnp.uint8)


def _one_of(field: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(known)}")
    return value
