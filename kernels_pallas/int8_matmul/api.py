"""The product of 8-bit integers with a scale for each row of input and each column of weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import door
from kernels_pallas.int8_matmul import blocks, reference, tpu, tpu_quantizer
from kernels_pallas.quantized_matmul.api import quantized_matmul, varying_alike
from kernels_pallas.target import Target, current_target

Array = jax.Array

IMPLEMENTATIONS: tuple[str, ...] = ("plain", "tpu")
"""Names; "plain" is `blocks` on a CPU and XLA's own product elsewhere."""


def quantize_rows(
    x: Array, threshold: float | None = None, *, implementation: str | None = None
) -> tuple[Array, Array, Array]:
    """Codes of 8 bits with a scale for each row: `codes = round(127 x / r)`, `scale = r / 127`, `r`
    the row's largest absolute value.

    Args:
        x: `[..., K]`; float32 or bfloat16.
        threshold: channels in which any row reaches it are outliers: their codes are 0, and values
            that reach it do not count for `r` (LLM.int8()). None: there are none.
        implementation: a name in `IMPLEMENTATIONS`; None picks by device.

    Returns:
        codes `int8[..., K]`, scales `float32[...]` and outliers `bool[K]`. A row that is not finite
        has such a scale. No gradients: see `int8_matmul`.
    """
    if threshold is not None and threshold <= 0:
        raise ValueError(f"threshold={threshold}; expected a positive number, or None for none")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; quantize_rows takes floating point input")
    flat = jax.lax.stop_gradient(x.reshape(-1, x.shape[-1]))
    codes, scales, outlier = door.call(
        QUANTIZER, implementation, {"x": flat}, {"threshold": threshold}
    )
    return codes.reshape(x.shape), scales.reshape(x.shape[:-1]), outlier


def int8_matmul(
    x: Array,
    codes: Array,
    scales: Array,
    x_scales: Array | None = None,
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """`x_scales * scales * (x @ codes)`, with an exact integer product.

    Args:
        x: `int8[..., K]` with `x_scales`; or floating point, which is quantized here row by row
            (`quantize_rows`). Then its gradient is that of `x @ (codes * scales)`, as if nothing
            were rounded; codes and scales have none.
        codes: `int8[K, N]`, K at most `reference.MOST_ROWS`.
        scales: `[N]`.
        x_scales: `[...]`, of an `x` of integers.
        dtype: of the result; None is `x.dtype`, bfloat16 for an `x` of integers.
        implementation: a name in `IMPLEMENTATIONS`; None picks by device and shape.

    Raises `ValueError` naming the argument that does not fit.
    """
    _check(x, codes, scales, x_scales)
    call = _Call(implementation, jnp.dtype(dtype or (x.dtype if x_scales is None else "bfloat16")))
    flat = x.reshape(-1, x.shape[-1])
    if x_scales is None:
        flat, codes, scales = varying_alike((flat, codes, scales))
        y: Array = _straight_through(flat, codes, scales, call)  # pyright: ignore
    else:
        flat, codes, scales, by_row = varying_alike((flat, codes, scales, x_scales.reshape(-1)))
        y = _product(flat, codes, scales, by_row, call)
    return y.reshape(*x.shape[:-1], codes.shape[1])


@dataclass(frozen=True)
class _Call:
    """implementation: a name, or None. dtype: of the result."""

    implementation: str | None
    dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _straight_through(x: Array, codes: Array, scales: Array, call: _Call) -> Array:
    quantized, x_scales, _ = quantize_rows(x)
    return _product(quantized, codes, scales, x_scales, call)


def _forward(x: Array, codes: Array, scales: Array, call: _Call) -> tuple[Array, Any]:
    return _straight_through(x, codes, scales, call), (codes, scales, x[:0])


def _backward(call: _Call, kept: Any, dy: Array) -> tuple[Array, None, Array]:
    codes, scales, like = kept
    dx = quantized_matmul(dy.astype(like.dtype), codes, scales, transposed=True)
    return dx, None, jnp.zeros_like(scales)


_straight_through.defvjp(_forward, _backward)


def _product(x: Array, codes: Array, scales: Array, x_scales: Array, call: _Call) -> Array:
    implementation, target = call.implementation, current_target()
    if implementation is None and target.generation != "7x":
        implementation = "plain"  # XLA is as fast; see `tpu`
    arguments = {"x": x, "w": codes, "x_scales": x_scales, "scales": scales}
    return door.call(PRODUCT, implementation, arguments, {"dtype": call.dtype})


def _plain_product(x: Array, w: Array, x_scales: Array, scales: Array, dtype: Any) -> Array:
    exact = blocks.product if current_target().platform == "cpu" else reference.product
    return reference.scaled(exact(x, w), x_scales, scales, dtype)


def _tpu_product(
    x: Array, w: Array, x_scales: Array, scales: Array, dtype: Any, target: Target
) -> Array:
    assert target.generation is not None
    options = {"generation": target.generation, "dtype": dtype}
    return tpu.int8_matmul(x, w, x_scales, scales, **options)


def _tpu_quantizer(x: Array, threshold: float | None, target: Target) -> tuple[Array, Array, Array]:
    assert target.generation is not None
    return tpu_quantizer.quantize_rows(x, threshold, generation=target.generation)


def _obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    if target.generation is None:
        return f"there is none for {target.device_kind}"
    if arguments["x"].size == 0 or ("w" in arguments and arguments["w"].size == 0):
        return "the product is empty"
    return None


QUANTIZER = door.Operation(
    "quantize_rows", reference.quantize_rows, {"tpu": _tpu_quantizer}, {"tpu": _obstacle}
)
PRODUCT = door.Operation("int8_matmul", _plain_product, {"tpu": _tpu_product}, {"tpu": _obstacle})


def _check(x: Array, codes: Array, scales: Array, x_scales: Array | None) -> None:
    if codes.ndim != 2 or codes.dtype != jnp.int8 or x.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"int8_matmul takes x [..., K] and codes int8[K, N]; got x {x.dtype}{x.shape} and "
            f"codes {codes.dtype}{codes.shape}"
        )
    if codes.shape[0] > reference.MOST_ROWS:
        raise ValueError(
            f"codes has {codes.shape[0]} rows; sums of more than {reference.MOST_ROWS} products "
            "do not fit 32 bits: split the rows"
        )
    if scales.shape != codes.shape[1:]:
        raise ValueError(
            f"scales has shape {scales.shape}; codes {codes.shape} take {codes.shape[1:]}"
        )
    whole = x.dtype == jnp.int8
    if whole != (x_scales is not None) or not (whole or jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(
            f"x is {x.dtype} {'with' if x_scales is not None else 'without'} x_scales; expected "
            "int8 with them, or floating point without"
        )
    if x_scales is not None and x_scales.shape != x.shape[:-1]:
        raise ValueError(f"x_scales has shape {x_scales.shape}; x {x.shape} takes {x.shape[:-1]}")
