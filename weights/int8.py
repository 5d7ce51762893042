"""Eight bits a weight with a scale for each output; inputs may be coded, and outliers kept apart.

    W[k, n] = scale[n] * q[k, n]

With `act`, the product is one of whole numbers (W8A8, SmoothQuant). With `outlier`, some inputs are
multiplied in 16 bits beside it: LLM.int8() (arXiv 2208.07339) finds them in every call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.quantized_matmul import quantized_matmul
from weights import codes as code_forms
from weights.act_quant import ActQuant
from weights.grid import Grid, encode, fit_minmax

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "w"],
    meta_fields=["threshold", "capacity"],
)
@dataclass(frozen=True)
class Outlier:
    """Inputs that are not coded.

    index: int32[C] and w: [C, N], fixed inputs and their rows, which are 0 in the codes (an index
        beyond K fills up a list); None where they are found in each call: the `capacity` inputs at
        most that reach `threshold` in any row of it. Others are coded like the rest.
    """

    index: Array | None = None
    w: Array | None = None
    threshold: float | None = None
    capacity: int | None = None

    def aligned(self, layers: Sequence[Outlier]) -> list[Outlier]:
        """The same layers with lists of one length, that of the longest."""
        if any(layer.index is None or layer.w is None for layer in layers):
            return list(layers)
        longest = max(len(layer.index) for layer in layers)  # pyright: ignore
        return [_filled(layer, longest) for layer in layers]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "scale", "act", "outlier"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Int8:
    """A matrix `[K, N]` of 8-bit codes.

    q: int8[K, N], -127 .. 127. scale: float32[N]. act: how the input is coded, None: not at all.
    """

    q: Array
    scale: Array
    act: ActQuant | None = None
    outlier: Outlier | None = None

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., K] -> [..., N]` in `x.dtype`; sums are exact integers with `act`, else float32."""
        if self.outlier is None:
            return self._coded(x, x.dtype)
        index, kept, rows = self._apart(x)
        out = jnp.zeros(x.shape[-1], bool).at[index].set(kept)
        rest = jnp.where(out, 0, x).astype(x.dtype)
        ours = jnp.where(kept, jnp.take(x, index, axis=-1, mode="clip"), 0).astype(x.dtype)
        beside = jnp.matmul(ours, rows.astype(x.dtype), preferred_element_type=jnp.float32)
        return (self._coded(rest, jnp.float32) + beside).astype(x.dtype)

    def _coded(self, x: Array, dtype: Any) -> Array:
        if self.act is None:
            return quantized_matmul(x, self.q, self.scale, dtype=dtype)
        product = _coded_product(x, self.q, self.act)
        return (product * self.scale.astype(jnp.float32)).astype(dtype)

    def _apart(self, x: Array) -> tuple[Array, Array, Array]:
        """The inputs that are multiplied beside the codes, which of them really are, and their
        rows.
        """
        assert self.outlier is not None
        if self.outlier.index is not None and self.outlier.w is not None:
            return self.outlier.index, jnp.ones(self.outlier.index.shape, bool), self.outlier.w
        if self.outlier.capacity is None or self.outlier.threshold is None:
            raise ValueError("an Outlier has index and w (fixed inputs), or threshold and capacity")
        flat = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1])
        peaks = jnp.max(jnp.abs(flat.astype(jnp.float32)), axis=0, initial=0.0)
        peaks, index = jax.lax.top_k(peaks, min(self.outlier.capacity, len(peaks)))
        rows = self.q[index].astype(jnp.float32) * self.scale.astype(jnp.float32)
        return index, peaks >= self.outlier.threshold, rows

    def matmul_transposed(self, x: Array) -> Array:
        """`[..., N] -> [..., K]` in `x.dtype`, against the transposed matrix; the input is not
        coded.
        """
        y = quantized_matmul(x, self.q, self.scale, transposed=True, dtype=jnp.float32)
        if self.outlier is not None and self.outlier.w is not None:
            rows = self.outlier.w.astype(x.dtype)
            beside = jnp.matmul(x, rows.T, preferred_element_type=jnp.float32)
            y = y.at[..., self.outlier.index].add(beside)
        return y.astype(x.dtype)

    def lookup(self, ids: Array) -> Array:
        """Rows `float32[..., N]`; ids outside give zeros."""
        if self.outlier is not None and self.outlier.w is not None:
            return jnp.take(self.dequantize(), ids, axis=0, mode="fill", fill_value=0)
        rows = jnp.take(self.q, ids, axis=0, mode="fill", fill_value=0)
        return rows.astype(jnp.float32) * self.scale.astype(jnp.float32)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`[..., K, N]`; axes in front of the stored arrays stay there."""
        dense = self.q.astype(jnp.float32) * self.scale.astype(jnp.float32)[..., None, :]
        if self.outlier is not None and self.outlier.w is not None:
            place = jax.nn.one_hot(self.outlier.index, self.q.shape[-2], axis=-2)
            rows = self.outlier.w.astype(jnp.float32)
            dense = dense + jnp.matmul(place, rows, precision=jax.lax.Precision.HIGHEST)
        return dense.astype(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`, of one matrix of a stack."""
        return self.q.shape[-2], self.q.shape[-1]

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        return math.prod(self.q.shape)

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return code_forms.array_bytes(self)

    def nominal_bits(self) -> float:
        """8."""
        return 8.0

    def prepare(self, backend: str) -> Int8:
        """Itself: both forms agree."""
        return self

    def split_units(self) -> tuple[int, int]:
        """Rows and columns that must stay on one device."""
        return 1, 1

    def trimmed(self) -> Int8:
        """The same without the places of a list of outliers that no layer uses; concrete arrays."""
        outlier = self.outlier
        if outlier is None or outlier.index is None or outlier.w is None:
            return self
        used = (np.asarray(outlier.index) < self.shape[0]).reshape(-1, outlier.index.shape[-1])
        length = 1 + int(np.flatnonzero(used.any(axis=0)).max(initial=-1))
        if not length:
            return dataclasses.replace(self, outlier=None)
        index, w = outlier.index[..., :length], outlier.w[..., :length, :]
        return dataclasses.replace(self, outlier=dataclasses.replace(outlier, index=index, w=w))

    @property
    def separable(self) -> tuple[bool, bool]:
        """Rows are on their own unless a range or outliers are found over all of them; inputs if
        they are not coded.
        """
        by_row = self.act is None or self.act.mode != "tensor"
        fixed = self.outlier is None or self.outlier.w is not None
        return by_row and fixed, self.act is None and self.outlier is None

    def specs(self, spec: PartitionSpec) -> Int8:
        """Codes as the matrix, scales by output, outliers' rows by output."""
        inputs, outputs = code_forms.matrix_axes(spec)
        whole: Any = jax.tree.map(lambda _: PartitionSpec(), self)
        outlier = whole.outlier
        if self.outlier is not None and self.outlier.w is not None:
            outlier = dataclasses.replace(outlier, w=PartitionSpec(None, outputs))
        matrix, scale = PartitionSpec(inputs, outputs), PartitionSpec(outputs)
        return dataclasses.replace(whole, q=matrix, scale=scale, outlier=outlier)


def quantize(
    w: Array,
    *,
    act: ActQuant | None = None,
    outliers: Array | None = None,
    threshold: float | None = None,
) -> Int8:
    """Round `w [K, N]` to 8 bits with the largest value of each output as its range.

    `outliers int32[C]`: inputs whose rows stay in bfloat16. `threshold`: find outliers in each
    call, an eighth of the inputs at most, and code the rest (LLM.int8(), 6.0).
    """
    w = w.astype(jnp.float32)
    outlier = None
    if outliers is not None:
        outliers = jnp.asarray(outliers, jnp.int32)
        outlier = Outlier(outliers, w[outliers].astype(jnp.bfloat16))
        w = w.at[outliers].set(0.0)
    elif threshold is not None:
        outlier = Outlier(threshold=float(threshold), capacity=max(1, w.shape[0] // 8))
        act = act or ActQuant()
    grid = Grid(8, "odd")
    scale, zero = fit_minmax(w, grid)
    codes = encode(w, scale, zero, grid).astype(jnp.int16) - grid.middle
    return Int8(codes.astype(jnp.int8), scale, act, outlier)


def _filled(layer: Outlier, length: int) -> Outlier:
    """With inputs that do not exist and rows of zeros behind, up to `length`."""
    assert layer.index is not None
    assert layer.w is not None
    missing = length - len(layer.index)
    index = jnp.pad(layer.index, (0, missing), constant_values=jnp.iinfo(jnp.int32).max)
    return dataclasses.replace(layer, index=index, w=jnp.pad(layer.w, ((0, missing), (0, 0))))


@jax.custom_vjp
def _coded_product(x: Array, q: Array, act: ActQuant) -> Array:
    """`x` coded, times whole numbers `q`: `float32[..., N]`."""
    codes, scale, zero = act.codes(x)
    y = int8_matmul(codes, q, jnp.ones(q.shape[1]), scale, dtype=jnp.float32)
    if zero is None:
        return y
    sums = jnp.sum(q, axis=0, dtype=jnp.int32).astype(jnp.float32)
    return y - (scale * zero)[..., None] * sums


def _forward(x: Array, q: Array, act: ActQuant) -> tuple[Array, Any]:
    return _coded_product(x, q, act), (x[:0], q, act, act.inside(x))


def _backward(kept: Any, dy: Array) -> tuple[Array, None, Any]:
    like, q, act, inside = kept
    dx = quantized_matmul(dy, q, jnp.ones(q.shape[1]), transposed=True)
    dx = dx if inside is None else jnp.where(inside, dx, 0)
    return dx.astype(like.dtype), None, jax.tree.map(jnp.zeros_like, act)


_coded_product.defvjp(_forward, _backward)
