"""The grouped product and its weight gradient as JAX primitives: each is the other's transpose, so
forward mode, reverse mode and their compositions work with every implementation.

    y = x w_e     transposed in x: g w_e^T              in w: outer(x, g)
    W_e = x^T g   transposed in x: grouped g W_e^T      in g: grouped x W_e

A loop with a varying number of turns has no reverse mode of its own. The lowering picks the
implementation of the platform that is compiled for, which need not be the one at hand.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernels_pallas.door import why_not_here
from kernels_pallas.grouped_matmul import blocks, gpu, ragged, reference

Array = jax.Array

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "plain": reference,
    "blocks": blocks,
    "ragged": ragged,
    "gpu": gpu,
}
PLATFORMS = {"tpu": "ragged", "cuda": "gpu", "rocm": "ragged"}
"""Platform -> implementation; the others take "blocks". For "cuda", a program that the compiler
partitions over several devices takes "ragged".
"""

matmul = Primitive("grouped_matmul")
outer = Primitive("grouped_outer")


def _matmul_shape(x: Any, w: Any, sizes: Any, *, transposed: bool, dtype: Any, **_: Any) -> Any:
    return ShapedArray((x.shape[0], w.shape[1 if transposed else 2]), dtype)


def _outer_shape(x: Any, g: Any, sizes: Any, *, dtype: Any, **_: Any) -> Any:
    return ShapedArray((sizes.shape[0], x.shape[1], g.shape[1]), dtype)


def _run_matmul(
    default: str, x: Array, w: Array, sizes: Array, *, implementation: str | None, **options: Any
) -> Array:
    return IMPLEMENTATIONS[implementation or default].grouped_matmul(x, w, sizes, **options)


def _run_outer(
    default: str, x: Array, g: Array, sizes: Array, *, implementation: str | None, **options: Any
) -> Array:
    return IMPLEMENTATIONS[implementation or default].grouped_outer(x, g, sizes, **options)


def _jvp(primitive: Primitive, primals: Any, tangents: Any, **options: Any) -> tuple[Any, Any]:
    """Linear in each of the first two arguments."""
    (a, b, sizes), (of_a, of_b, _) = primals, tangents
    value = primitive.bind(a, b, sizes, **options)
    parts = []
    if type(of_a) is not ad.Zero:
        parts.append(primitive.bind(of_a, b, sizes, **options))
    if type(of_b) is not ad.Zero:
        parts.append(primitive.bind(a, of_b, sizes, **options))
    return value, functools.reduce(jnp.add, parts)


def _matmul_transpose(
    g: Any, x: Any, w: Any, sizes: Any, *, transposed: bool, dtype: Any, implementation: str | None
) -> list[Any]:
    if type(g) is ad.Zero:
        return [None, None, None]
    if ad.is_undefined_primal(x):
        kind = x.aval.dtype
        options = {"transposed": not transposed, "dtype": kind, "implementation": implementation}
        return [matmul.bind(g.astype(kind), w, sizes, **options), None, None]
    pair = (g.astype(x.dtype), x) if transposed else (x, g.astype(x.dtype))
    of_w = outer.bind(*pair, sizes, dtype=w.aval.dtype, implementation=implementation)
    return [None, of_w, None]


def _outer_transpose(
    w: Any, x: Any, g: Any, sizes: Any, *, dtype: Any, implementation: str | None
) -> list[Any]:
    if type(w) is ad.Zero:
        return [None, None, None]
    missing, given = (x, g) if ad.is_undefined_primal(x) else (g, x)
    found = matmul.bind(
        given,
        w,
        sizes,
        transposed=missing is x,
        dtype=missing.aval.dtype,
        implementation=implementation,
    )
    return [found, None, None] if missing is x else [None, found, None]


def _mapped(primitive: Primitive, arguments: Any, axes: Any, **options: Any) -> tuple[Array, int]:
    """One after the other, each with the groups of its own."""
    moved = [
        jnp.moveaxis(argument, axis, 0)
        for argument, axis in zip(arguments, axes, strict=True)
        if axis is not None
    ]

    def one(pieces: list[Array]) -> Array:
        left = iter(pieces)
        whole = [
            argument if axis is None else next(left)
            for argument, axis in zip(arguments, axes, strict=True)
        ]
        return primitive.bind(*whole, **options)

    return jax.lax.map(one, moved), 0


def _lower(run: Any, platform: str, context: Any, *arguments: Any, **options: Any) -> Any:
    """The implementation of a platform, where the program is one device's; see `PLATFORMS`."""
    name = PLATFORMS[platform]
    if platform == "cuda" and why_not_here(context.module_context, "gpu") is not None:
        name = "ragged"
    function = functools.partial(run, name)
    return mlir.lower_fun(function, multiple_results=False)(context, *arguments, **options)


for _primitive, _shape, _run, _transpose in (
    (matmul, _matmul_shape, _run_matmul, _matmul_transpose),
    (outer, _outer_shape, _run_outer, _outer_transpose),
):
    _primitive.def_abstract_eval(_shape)
    _primitive.def_impl(
        jax.jit(_primitive.bind, static_argnames=("transposed", "dtype", "implementation"))
    )
    mlir.register_lowering(
        _primitive, mlir.lower_fun(functools.partial(_run, "blocks"), multiple_results=False)
    )
    for _platform in PLATFORMS:
        mlir.register_lowering(
            _primitive, functools.partial(_lower, _run, _platform), platform=_platform
        )
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
    ad.primitive_transposes[_primitive] = _transpose
    batching.primitive_batchers[_primitive] = functools.partial(_mapped, _primitive)
