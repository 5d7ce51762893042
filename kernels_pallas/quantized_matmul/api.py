"""The quantized product by the name of its implementation; every implementation computes what
`reference` defines.

Differentiable in `x`, and in scales, zeros, offsets and table: the gradient of `x` goes through the
codes as the product does, the others through `x^T dy`, and only where they are asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels_pallas import door
from kernels_pallas.gpu_topology import gpu_of
from kernels_pallas.quantized_matmul import blocks, gpu, reference, tpu
from kernels_pallas.quantized_matmul.operand import Operand, held_rows, operand
from kernels_pallas.target import Target, current_target

Array = jax.Array

IMPLEMENTATIONS: tuple[str, ...] = ("plain", "tpu", "gpu")
"""Names; "plain" is `blocks` on a CPU and `reference` elsewhere."""


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
    transposed: bool = False,
    rows: int | None = None,
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
        transposed: multiply by `W^T`: x is `[..., N]` and the result `[..., K]`.
        rows: K, where `transposed`; None is all rows that the codes hold.
        dtype: of the result, `[..., N]`. None is `x.dtype`.
        implementation: a name in `IMPLEMENTATIONS`. None picks by device, shape and type; where no
            kernel serves, the plain function runs, with one warning.

    Raises `ValueError` naming the argument that does not fit and what would. The compiler cannot
    split a kernel over a mesh: call it inside `jax.shard_map` there.
    """
    if not transposed:
        rows = x.shape[-1]
    elif rows is None:
        rows = codes.shape[0] if bits is None else held_rows(codes, bits)
    w = operand(codes, scales, zeros, offsets, table, select, rows=rows, bits=bits, group=group)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; quantized_matmul takes floating point input")
    if transposed and x.shape[-1] != w.columns:
        raise ValueError(f"x has {x.shape[-1]} features; the transposed codes take {w.columns}")
    flat = x.reshape(-1, x.shape[-1])
    flat, w = varying_alike((flat, w))
    call = _Call(implementation, jnp.dtype(dtype or x.dtype), x.dtype, transposed)
    return _product(flat, w, call).reshape(*x.shape[:-1], w.rows if transposed else w.columns)


def varying_alike(arrays: Any) -> Any:
    """Inside `jax.shard_map`, all arrays vary over the axes that any does: what is the same on all
    devices is so no more, and its gradient is summed over them.
    """
    leaves = jax.tree.leaves(arrays)
    varying = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def cast(leaf: Array) -> Array:
        missing = tuple(varying - jax.typeof(leaf).manual_axis_type.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, arrays)


@dataclass(frozen=True)
class _Call:
    """implementation: a name. dtype: of the result. given: of the input. transposed: by `W^T`."""

    implementation: str | None
    dtype: Any
    given: Any
    transposed: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Operand, call: _Call) -> Any:
    return _run(x, w, call, call.dtype, call.transposed)


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
    dx = _run(dy, w, call, call.given, not call.transposed)
    if x is None:
        return dx, None
    pair = (dy, x) if call.transposed else (x, dy)
    return dx, reference.parameter_gradients(*pair, w)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(x: Array, w: Operand, call: _Call, dtype: Any, transposed: bool) -> Array:
    implementation = call.implementation
    if implementation is None and _left_to_xla(x, w, transposed):
        implementation = "plain"
    options = {"dtype": dtype, "transposed": transposed}
    return door.call(OPERATION, implementation, {"x": x, "w": w}, options)


def _plain(x: Array, w: Operand, dtype: Any, transposed: bool) -> Array:
    module = blocks if current_target().platform == "cpu" else reference
    product = module.matmul_transposed if transposed else module.matmul
    return product(x, w).astype(dtype)


def _tpu(x: Array, w: Operand, dtype: Any, transposed: bool, target: Target) -> Array:
    assert target.generation is not None
    product = tpu.matmul_transposed if transposed else tpu.matmul
    return product(x, w, generation=target.generation, dtype=dtype)


def _gpu(x: Array, w: Operand, dtype: Any, transposed: bool, target: Target) -> Array:
    device = gpu_of(target.device_kind)
    assert device is not None
    assert not transposed
    return gpu.matmul(x, w, device=device, dtype=dtype)


def _obstacle_on_tpu(
    target: Target, arguments: dict[str, Any], options: dict[str, Any]
) -> str | None:
    if target.generation is None:
        return f"there is none for {target.device_kind}"
    return tpu.unsupported(arguments["x"], arguments["w"])


def _obstacle_on_gpu(
    target: Target, arguments: dict[str, Any], options: dict[str, Any]
) -> str | None:
    if gpu_of(target.device_kind) is None:
        return f"there is none for {target.device_kind}"
    x, w = arguments["x"], arguments["w"]
    if _left_to_xla_on_gpu(x, w, options["transposed"]):
        return f"it takes words of codes and up to {gpu.MOST_ROWS} rows, and is not transposed"
    return gpu.unsupported(x, w)


OPERATION = door.Operation(
    "quantized_matmul",
    _plain,
    {"tpu": _tpu, "gpu": _gpu},
    {"tpu": _obstacle_on_tpu, "gpu": _obstacle_on_gpu},
)


def _left_to_xla(x: Array, w: Operand, transposed: bool) -> bool:
    """Whether XLA is as fast by itself: on a TPU it moves the conversion of 8-bit codes into the
    product, on a GPU a matrix is better written out once for many rows.
    """
    target = current_target()
    if target.platform == "gpu":
        return _left_to_xla_on_gpu(x, w, transposed)
    one_scale = w.groups == 1 or target.generation == "v4"
    return target.platform == "tpu" and not w.packed and one_scale


def _left_to_xla_on_gpu(x: Array, w: Operand, transposed: bool) -> bool:
    return transposed or not w.packed or x.shape[0] > gpu.MOST_ROWS
