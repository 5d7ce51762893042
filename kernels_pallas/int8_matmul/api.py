"""The product of 8-bit integers with a scale for each row of input and each column of weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import door
from kernels_pallas.gpu_topology import gpu_of
from kernels_pallas.int8_matmul import blocks, gpu, reference, tpu, tpu_quantizer
from kernels_pallas.quantized_matmul.api import quantized_matmul, varying_alike
from kernels_pallas.target import Target, current_target

Array = jax.Array

IMPLEMENTATIONS: tuple[str, ...] = ("plain", "tpu", "gpu")
"""Names; "plain" is `blocks` on a CPU and XLA's own product elsewhere. On a GPU, XLA quantizes the
rows.
"""


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
    bias: Array | None = None,
    addend: Array | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """`x_scales * scales * (x @ codes) + bias + addend`, with an exact integer product.

    Args:
        x: `int8[..., K]` with `x_scales`; or floating point, which is quantized here row by row
            (`quantize_rows`). Then its gradient is that of `x @ (codes * scales)`, as if nothing
            were rounded, and `bias` and `addend` have theirs; codes and scales have none.
        codes: `int8[K, N]`, K at most `reference.MOST_ROWS`.
        scales: `[N]`.
        x_scales: `[...]`, of an `x` of integers.
        bias: `[N]`.
        addend: `[..., N]`, such as the product of the channels that were left out of the codes.
        dtype: of the result; None is `x.dtype`, bfloat16 for an `x` of integers.
        implementation: a name in `IMPLEMENTATIONS`; None picks by device and shape.

    Raises `ValueError` naming the argument that does not fit.
    """
    _check(x, codes, scales, x_scales)
    _check_terms(x, codes, bias, addend)
    call = _Call(implementation, jnp.dtype(dtype or (x.dtype if x_scales is None else "bfloat16")))
    flat, by_row = x.reshape(-1, x.shape[-1]), None if x_scales is None else x_scales.reshape(-1)
    terms = (bias, None if addend is None else addend.reshape(-1, codes.shape[1]))
    flat, codes, scales, by_row, terms = varying_alike((flat, codes, scales, by_row, terms))
    if by_row is None:
        y: Array = _straight_through(flat, codes, scales, terms, call)  # pyright: ignore
    else:
        y = _product(flat, codes, scales, by_row, terms, call)
    return y.reshape(*x.shape[:-1], codes.shape[1])


Terms = tuple[Array | None, Array | None]
"""bias `[N]` and addend `[M, N]`."""


@dataclass(frozen=True)
class _Call:
    """implementation: a name, or None. dtype: of the result."""

    implementation: str | None
    dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _straight_through(x: Array, codes: Array, scales: Array, terms: Terms, call: _Call) -> Array:
    quantized, x_scales, _ = quantize_rows(x)
    return _product(quantized, codes, scales, x_scales, terms, call)


def _forward(x: Array, codes: Array, scales: Array, terms: Terms, call: _Call) -> tuple[Array, Any]:
    kinds = jax.tree.map(lambda term: term[:0], (x, terms))
    return _straight_through(x, codes, scales, terms, call), (codes, scales, kinds)


def _backward(call: _Call, kept: Any, dy: Array) -> tuple[Array, None, Array, Terms]:
    codes, scales, (like, (bias, addend)) = kept
    dx = quantized_matmul(dy.astype(like.dtype), codes, scales, transposed=True)
    of_bias = None if bias is None else jnp.sum(dy, axis=0, dtype=jnp.float32).astype(bias.dtype)
    of_addend = None if addend is None else dy.astype(addend.dtype)
    return dx, None, jnp.zeros_like(scales), (of_bias, of_addend)


_straight_through.defvjp(_forward, _backward)


def _product(
    x: Array, codes: Array, scales: Array, x_scales: Array, terms: Terms, call: _Call
) -> Array:
    implementation, target = call.implementation, current_target()
    if implementation is None and target.platform == "tpu" and target.generation != "7x":
        implementation = "plain"  # XLA is as fast; see `tpu`
    arguments = {"x": x, "w": codes, "x_scales": x_scales, "scales": scales, "terms": terms}
    return door.call(PRODUCT, implementation, arguments, {"dtype": call.dtype})


def _plain_product(
    x: Array, w: Array, x_scales: Array, scales: Array, terms: Terms, dtype: Any
) -> Array:
    exact = blocks.product if current_target().platform == "cpu" else reference.product
    return reference.scaled(exact(x, w), x_scales, scales, dtype, *terms)


def _tpu_product(
    x: Array, w: Array, x_scales: Array, scales: Array, terms: Terms, dtype: Any, target: Target
) -> Array:
    assert target.generation is not None
    kind = dtype if all(term is None for term in terms) else jnp.float32
    y = tpu.int8_matmul(x, w, x_scales, scales, generation=target.generation, dtype=kind)
    return reference.added(y, *terms).astype(dtype)


def _gpu_product(
    x: Array, w: Array, x_scales: Array, scales: Array, terms: Terms, dtype: Any, target: Target
) -> Array:
    device = gpu_of(target.device_kind)
    assert device is not None
    return gpu.int8_matmul(x, w, x_scales, scales, *terms, device=device, dtype=dtype)


def _tpu_quantizer(x: Array, threshold: float | None, target: Target) -> tuple[Array, Array, Array]:
    assert target.generation is not None
    return tpu_quantizer.quantize_rows(x, threshold, generation=target.generation)


def _obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    if target.generation is None:
        return f"there is none for {target.device_kind}"
    if arguments["x"].size == 0 or ("w" in arguments and arguments["w"].size == 0):
        return "the product is empty"
    return None


def _obstacle_on_gpu(
    target: Target, arguments: dict[str, Any], options: dict[str, Any]
) -> str | None:
    if gpu_of(target.device_kind) is None:
        return f"there is none for {target.device_kind}"
    return gpu.unsupported(arguments["x"], arguments["w"], options["dtype"])


QUANTIZER = door.Operation(
    "quantize_rows", reference.quantize_rows, {"tpu": _tpu_quantizer}, {"tpu": _obstacle}
)
PRODUCT = door.Operation(
    "int8_matmul",
    _plain_product,
    {"tpu": _tpu_product, "gpu": _gpu_product},
    {"tpu": _obstacle, "gpu": _obstacle_on_gpu},
)


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


def _check_terms(x: Array, codes: Array, bias: Array | None, addend: Array | None) -> None:
    fitting = {"bias": codes.shape[1:], "addend": (*x.shape[:-1], codes.shape[1])}
    for (name, shape), term in zip(fitting.items(), (bias, addend), strict=True):
        if term is not None and term.shape != shape:
            raise ValueError(
                f"{name} has shape {term.shape}; x {x.shape} and codes {codes.shape} take {shape}"
            )
