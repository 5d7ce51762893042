"""The quantized product by the name of its implementation; every implementation computes what
`reference` defines.

Differentiable in `x`, and in scales, zeros, offsets and table: the gradient of `x` goes through the
codes as the product does, the others through `x^T dy`, and only where they are asked for.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels_pallas.quantized_matmul import blocks, reference, tpu
from kernels_pallas.quantized_matmul.operand import Operand, operand
from kernels_pallas.target import Target, current_target, warn_once

Array = jax.Array

PLAIN: dict[str, ModuleType] = {"plain": reference, "blocks": blocks}
IMPLEMENTATIONS: tuple[str, ...] = (*PLAIN, "tpu")
"""Names: the definition, what a CPU runs, and the kernels."""


def quantized_matmul(
    x: Array,
    codes: Array,
    scales: Array,
    zeros: Array | None = None,
    *,
    bits: int | None = None,
    group: int | None = None,
    table: Array | None = None,
    select: Array | None = None,
    offsets: Array | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """`x @ W` with `W[k, n] = scales[g, n] * (value(codes[k, n]) - zeros[g, n]) + offsets[g, n]`,
    `g = k // group`; codes enter the product exactly, and sums are in float32.

    Args:
        x: `[..., K]`; float32 or bfloat16.
        codes: `uint32[packing.packed_rows(K, bits), N]`, as `packing.pack` lays them; or one whole
            number an element, `int8`, `uint8`, `int4` or `uint4[K, N]`.
        scales: `[K / group, N]`, or `[N]` for one a column.
        zeros: `[K / group, N]`, not only whole numbers. None: `2 ** (bits - 1)` for unsigned codes
            (words are unsigned) and 0 for signed ones and for those of a table.
        bits: of a code, 1 to 8; needed for words.
        group: input features that share a scale. None is all of them.
        table: what a code stands for, `[2 ** bits]`; `[tables, 2 ** bits]` with `select`. Its
            entries are rounded to `x.dtype`, as a dense weight would be.
        select: `[K / group, N]`, the table of each group.
        offsets: `[K / group, N]`, added to the weights.
        dtype: of the result, `[..., N]`. None is `x.dtype`.
        implementation: a name in `IMPLEMENTATIONS`. None picks by device, shape and type; where no
            kernel serves, the plain function runs, with one warning.

    Raises `ValueError` naming the argument that does not fit and what would. A kernel is not split
    by the compiler over a mesh: call it inside `jax.shard_map` there.
    """
    rows = x.shape[-1]
    w = operand(codes, scales, zeros, offsets, table, select, rows=rows, bits=bits, group=group)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; quantized_matmul takes floating point input")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        near = ", ".join(difflib.get_close_matches(implementation, IMPLEMENTATIONS, cutoff=0.0))
        raise ValueError(
            f"quantized_matmul implementation {implementation!r} is not known; nearest: {near}"
        )
    flat = x.reshape(-1, rows)
    call = _Call(implementation or _best(flat, w), jnp.dtype(dtype or x.dtype), x.dtype)
    return _product(flat, w, call).reshape(*x.shape[:-1], w.columns)


@dataclass(frozen=True)
class _Call:
    """implementation: a name. dtype: of the result. given: of the input."""

    implementation: str
    dtype: Any
    given: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Operand, call: _Call) -> Any:
    return _run(x, w, call, call.dtype, transposed=False)


def _forward(x: Any, w: Operand, call: _Call) -> tuple[Array, tuple[Array | None, Operand]]:
    """The product; `x` is kept only where scales, zeros, offsets or table have gradients."""
    leaves = (w.scales, w.zeros, w.offsets, w.table)
    trained = any(leaf.perturbed for leaf in leaves if leaf is not None)  # pyright: ignore
    plain = jax.tree.map(lambda leaf: leaf.value, w, is_leaf=lambda leaf: hasattr(leaf, "value"))
    return _product(x.value, plain, call), (x.value if trained else None, plain)


def _backward(
    call: _Call, kept: tuple[Array | None, Operand], dy: Any
) -> tuple[Array, Operand | None]:
    x, w = kept
    zero = isinstance(dy, SymbolicZero)
    dy = jnp.zeros(dy.shape, call.given) if zero else dy.astype(call.given)
    dx = _run(dy, w, call, call.given, transposed=True)
    if x is None:
        return dx, None
    return dx, reference.parameter_gradients(x, dy, w)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(x: Array, w: Operand, call: _Call, dtype: Any, transposed: bool) -> Array:
    name = "matmul_transposed" if transposed else "matmul"
    if call.implementation in PLAIN:
        return getattr(PLAIN[call.implementation], name)(x, w).astype(dtype)
    target = current_target()
    if target.generation is None:
        raise ValueError(
            f"quantized_matmul implementation 'tpu': this program is compiled for "
            f"{target.platform} ({target.device_kind})"
        )
    return getattr(tpu, name)(x, w, generation=target.generation, dtype=dtype)


def _best(x: Array, w: Operand) -> str:
    """The implementation for the device that the program is traced for."""
    target = current_target()
    if target.platform == "cpu":
        return "blocks"
    obstacle = _obstacle(x, w, target)
    if obstacle is None:
        return "tpu"
    if obstacle:
        warn_once("quantized_matmul", obstacle)
    return "plain"


def _obstacle(x: Array, w: Operand, target: Target) -> str | None:
    """Why no kernel runs; "" where the plain function is as fast, None where one does."""
    if target.platform != "tpu" or target.generation is None:
        return f"there is none for {target.platform} ({target.device_kind})"
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[name] > 1 for name in (*mesh.auto_axes, *mesh.explicit_axes)):
        return "the compiler does not split a kernel over a mesh; call it in jax.shard_map"
    if not w.packed and (w.groups == 1 or target.generation == "v4"):
        return ""  # XLA moves the conversion of 8-bit codes into the product
    return tpu.unsupported(x, w)
