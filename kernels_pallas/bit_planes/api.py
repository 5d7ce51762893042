"""Products with codes in planes of one bit: exact integer ones, and sums of scaled signs."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import door
from kernels_pallas.bit_planes import blocks, gpu, reference, tpu
from kernels_pallas.gpu_topology import gpu_of
from kernels_pallas.quantized_matmul.api import quantized_matmul, varying_alike
from kernels_pallas.quantized_matmul.packing import packed_rows
from kernels_pallas.target import Target, current_target

Array = jax.Array

IMPLEMENTATIONS: tuple[str, ...] = ("plain", "tpu", "gpu")
"""Names; "plain" is `blocks` on a CPU and `reference` elsewhere."""
WIDE = 16
"""What the upper part of an integer that no signed byte holds is divided by."""


def bit_planes_matmul(
    x: Array, planes: Array, *, coding: str = "binary", implementation: str | None = None
) -> Array:
    """`x @ values(codes)`, exact: `int32[..., N]`, which must hold the result.

    Args:
        x: `int8`, `uint8` or `int16[..., K]`, values within -255 .. 255: what the activations'
            codes stand for, such as `2 code - (2**q - 1)` for bipolar ones.
        planes: `uint32[bits, packed_rows(K, 1), N]`, 1 to 8 planes; see `pack_planes`.
        coding: a name in `CODINGS`, what the codes of `planes` stand for.
        implementation: a name in `IMPLEMENTATIONS`; None picks by device.

    Raises `ValueError` naming the argument that does not fit. Scales and zeros are the caller's:
    with `W = s (code - z)`, `x W = s (x codes - z sum(x))`.
    """
    if coding not in reference.CODINGS:
        near = ", ".join(difflib.get_close_matches(coding, reference.CODINGS, cutoff=0.0))
        raise ValueError(f"coding {coding!r} is not known; nearest: {near}")
    if x.dtype not in (jnp.int8, jnp.uint8, jnp.int16):
        raise ValueError(f"x is {x.dtype}; expected int8, uint8, or int16 within -255 .. 255")
    words = packed_rows(x.shape[-1], 1)
    if planes.ndim != 3 or planes.dtype != jnp.uint32 or planes.shape[1] != words:
        raise ValueError(
            f"planes is {planes.dtype}{planes.shape}; x with {x.shape[-1]} features takes "
            f"uint32 [bits, {words}, N] (pack_planes)"
        )
    if not 1 <= planes.shape[0] <= 8:
        raise ValueError(f"planes has {planes.shape[0]} planes; codes have 1 to 8 bits")
    flat, planes = varying_alike((x.reshape(-1, x.shape[-1]), planes))
    y = door.call(OPERATION, implementation, {"x": flat, "planes": planes}, {"coding": coding})
    return y.reshape(*x.shape[:-1], planes.shape[2])


def binary_coded_matmul(
    x: Array,
    planes: Array,
    scales: Array,
    bias: Array | None = None,
    *,
    group: int | None = None,
    implementation: str | None = None,
) -> Array:
    """`x @ W` with `W = sum_i scales[i, g] (2 bit_i - 1) + bias[g]`, a matrix as a sum of scaled
    signs (binary-coded quantization; ShiftAddLLM, arXiv 2406.05981), as one product of
    `quantized_matmul` a plane. Differentiable as that is.

    Args:
        x: `[..., K]`; float32 or bfloat16.
        planes: `uint32[bits, packed_rows(K, 1), N]`; see `pack_planes`.
        scales: `[bits, K / group, N]`. bias: `[K / group, N]`.
        group: input features that share scales. None is all of them.
        implementation: of `quantized_matmul`.
    """
    if scales.ndim != 3 or scales.shape[0] != planes.shape[0]:
        raise ValueError(
            f"scales has shape {scales.shape}; {planes.shape[0]} planes take one [groups, N] each"
        )
    halves = jnp.full(scales.shape[1:], 0.5, jnp.float32)
    options: dict[str, Any] = {"bits": 1, "group": group, "implementation": implementation}
    total = None
    for plane, scale in zip(planes, scales, strict=True):
        offsets = bias if total is None else None
        made = quantized_matmul(
            x, plane, 2 * scale, halves, offsets=offsets, dtype=jnp.float32, **options
        )
        total = made if total is None else total + made
    assert total is not None
    return total.astype(x.dtype)


def _plain(x: Array, planes: Array, coding: str) -> Array:
    module = blocks if current_target().platform == "cpu" else reference
    return module.matmul(x, planes, coding)


def _tpu(x: Array, planes: Array, coding: str, target: Target) -> Array:
    assert target.generation is not None
    return _by_signed_bytes(functools.partial(tpu.matmul, generation=target.generation))(
        x, planes, coding
    )


def _gpu(x: Array, planes: Array, coding: str, target: Target) -> Array:
    device = gpu_of(target.device_kind)
    assert device is not None
    return _by_signed_bytes(functools.partial(gpu.matmul, device=device))(x, planes, coding)


def _by_signed_bytes(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel that takes signed bytes, of wider integers too: in two parts."""

    def product(x: Array, planes: Array, coding: str) -> Array:
        if x.dtype == jnp.int8:
            return kernel(x, planes, coding)
        wide = x.astype(jnp.int16)
        parts = jnp.concatenate([wide >> 4, wide & 15]).astype(jnp.int8)
        upper, lower = jnp.split(kernel(parts, planes, coding), 2)
        return WIDE * upper + lower

    return product


def _obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    if target.generation is None:
        return f"there is none for {target.device_kind}"
    if arguments["x"].size == 0 or arguments["planes"].size == 0:
        return "the product is empty"
    return None


def _obstacle_on_gpu(
    target: Target, arguments: dict[str, Any], options: dict[str, Any]
) -> str | None:
    if gpu_of(target.device_kind) is None:
        return f"there is none for {target.device_kind}"
    return gpu.unsupported(arguments["x"], arguments["planes"])


OPERATION = door.Operation(
    "bit_planes_matmul",
    _plain,
    {"tpu": _tpu, "gpu": _gpu},
    {"tpu": _obstacle, "gpu": _obstacle_on_gpu},
)
