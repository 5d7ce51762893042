"""The one linear layer and the one embedding: they multiply by whatever stands in the params tree.

A linear layer's params are `{"kernel": weight}` or `{"kernel": weight, "bias": [d_out]}`; an
embedding's are `{"table": weight}` with the table `[vocab, d_model]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from weights.product import product
from weights.protocol import is_format

Array = jax.Array


def matmul(x: Array, weight: Any, rng: Array | None = None, dtype: Any = None) -> Array:
    """`x @ w`: `[..., d_in] x [d_in, d_out] -> [..., d_out]`, accumulated in float32, returned in
    `dtype` (None: `x.dtype`).

    An array is cast to `x.dtype` at the product, so float32 masters multiply in the compute type
    of the activations.
    """
    if is_format(weight):
        return weight.matmul(x, rng=rng).astype(dtype or x.dtype)
    _check_inner(x.shape[-1], weight.shape[0], weight.shape)
    return _product(x, weight, 0, dtype)


def linear(
    params: Mapping[str, Any], x: Array, rng: Array | None = None, dtype: Any = None
) -> Array:
    """`x @ kernel + bias` (bias only if the params hold one): `[..., d_in] -> [..., d_out]`."""
    return bias_add(matmul(x, params["kernel"], rng=rng, dtype=dtype), params)


def bias_add(y: Array, params: Mapping[str, Any]) -> Array:
    """Add `params["bias"]` if there is one."""
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def embed(params: Mapping[str, Any], tokens: Array, dtype: Any) -> Array:
    """Rows of the table: `int32[...] -> dtype[..., d_model]`; ids outside the vocabulary give
    zeros.
    """
    return lookup(params["table"], tokens).astype(dtype)


def lookup(table: Any, ids: Array) -> Array:
    """Rows `[..., d_model]` of a table, an array or a format; ids outside give zeros."""
    if is_format(table):
        return table.lookup(ids)
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=0)


def unembed(params: Mapping[str, Any], x: Array, dtype: Any = None) -> Array:
    """Logits against a tied table: `[..., d_model] -> [..., vocab]` in `dtype` (None:
    `x.dtype`).
    """
    return matmul_transposed(x, params["table"], dtype)


def matmul_transposed(x: Array, weight: Any, dtype: Any = None) -> Array:
    """`x @ w.T`: `[..., d_out] x [d_in, d_out] -> [..., d_in]`, as `matmul`."""
    if is_format(weight):
        return weight.matmul_transposed(x).astype(dtype or x.dtype)
    _check_inner(x.shape[-1], weight.shape[1], weight.shape)
    return _product(x, weight, 1, dtype)


def _product(x: Array, weight: Array, contract: int, dtype: Any) -> Array:
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        weight = weight.astype(x.dtype)  # integers have no gradient
    return product(x, weight, contract).astype(dtype or x.dtype)


def _check_inner(features: int, rows: int, shape: tuple[int, ...]) -> None:
    if features != rows:
        raise ValueError(
            f"input has {features} features but the weight {tuple(shape)} takes {rows}"
        )
