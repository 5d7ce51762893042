"""One small matrix in every weight format, for tests that go through all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from weights import (
    ActQuant,
    LowRank,
    Permuted,
    codebook,
    float4,
    grouped,
    int8,
    low_rank_bank,
    lut,
    mixed,
    second_order,
    sparse_outlier,
)
from weights import normal_float as nf4

Array = jax.Array


def matrix(rows: int, columns: int, seed: int = 0) -> Array:
    """Weights `[rows, columns]` of the size that trained ones have."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(0.1 * rng.standard_normal((rows, columns)), jnp.float32)


def adapted(base, rank: int = 2):
    rows, columns = base.shape[-2:]
    return LowRank(base, matrix(rows, rank, 7), matrix(rank, columns, 8), scale=0.5)


def bank(w: Array):
    """Two adapters of other ranks over one base, and one that leaves it alone."""
    base = int8.quantize(w)
    return low_rank_bank.join(base, [adapted(base), None, adapted(base, 3)])


def spqr(w: Array):
    """A 3-bit base whose scales and zeros are coded again, and the largest residuals beside it."""
    plain = grouped.quantize(w, 3, 16, grid=grouped.Grid(3, include_zero=False))
    parts = [second_order.quantize(plain.scale.astype(jnp.float32))]
    parts.append(second_order.quantize(plain.zero.astype(jnp.float32)))
    codes = grouped.code_forms.elements(plain.codes, plain.form, 3, w.shape[0])
    base = grouped.from_codes(codes, *parts, bits=3, group=16)
    off = w - base.dequantize()
    return sparse_outlier.from_residual(base, jnp.where(jnp.abs(off) > 0.04, off, 0))


def slim(w: Array):
    """Halves of the groups with 4 and with 2 bits, interleaved."""
    by_group = w.reshape(-1, w.shape[0] // 4, w.shape[1])
    low, high = by_group[::2].reshape(-1, w.shape[1]), by_group[1::2].reshape(-1, w.shape[1])
    parts = (grouped.quantize(low, 2, -1), grouped.quantize(high, 4, -1))
    return mixed.join(parts, ([0, 2], [1, 3]))


def additive(w: Array):
    """Two books of 16 entries for tiles of 8 inputs; not fitted."""
    rng = np.random.default_rng(3)
    codes = jnp.asarray(rng.integers(0, 16, (w.shape[0] // 8, w.shape[1], 2)))
    tables = jnp.asarray(0.1 * rng.standard_normal((2, 16, 8, 1)), jnp.float32)
    return codebook.make(codes, tables, jnp.linspace(0.5, 1.5, w.shape[1]))


def selected(w: Array):
    """Two tables of 5 entries, one chosen by each group, with offsets."""
    rng = np.random.default_rng(4)
    groups = (w.shape[0] // 16, w.shape[1])
    return lut.from_codes(
        jnp.asarray(rng.integers(0, 5, w.shape)),
        jnp.asarray(rng.standard_normal((2, 5)), jnp.float32),
        jnp.asarray(rng.uniform(0.1, 1, groups), jnp.float32),
        group=16,
        select=jnp.asarray(rng.integers(0, 2, groups)),
        offset=jnp.asarray(0.1 * rng.standard_normal(groups), jnp.float32),
    )


MAKERS: dict[str, Callable[[Array], object]] = {
    "int8_outliers": lambda w: int8.quantize(w, outliers=jnp.asarray([3, 9])),
    "int4": lambda w: grouped.quantize(w, 4, 32),
    "int3_one_group": lambda w: grouped.quantize(w, 3, -1, symmetric=True),
    "qlora": lambda w: adapted(nf4.quantize(w, 32, double=True)),
    "bank": bank,
    "tables": selected,
    "permuted": lambda w: Permuted(float4.quantize(w, 32), jnp.arange(len(w))[::-1]),
    "spqr": spqr,
    "sparse_csr": lambda w: sparse_outlier.from_residual(
        int8.quantize(w), jnp.where(w > 0.2, w, 0), "csr"
    ),
    "slim": slim,
    "codebook": additive,
}
"""Linear formats: their product is that with `dequantize`."""

CODED: dict[str, Callable[[Array], object]] = {
    "w8a8": lambda w: int8.quantize(w, act=ActQuant()),
    "w8a8_static": lambda w: int8.quantize(w, act=ActQuant(jnp.float32(0.02), mode="static")),
    "llm_int8": lambda w: int8.quantize(w, threshold=6.0),
}
"""Formats that code their input."""


def make(name: str, w: Array):
    """The matrix in a format by name, in one program where its sizes do not depend on values."""
    maker = (MAKERS | CODED)[name]
    return maker(w) if name in ("spqr", "sparse_csr") else compiled(maker)(w)


@functools.cache
def compiled(maker: Callable[[Array], object]):
    return jax.jit(maker)
