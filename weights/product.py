"""The matrix product of a plain array, with transposes of its own.

JAX forms the transpose of a weight's gradient, `g^T x`, and turns it. XLA then moves `g`, which is
wider than `x` in most layers, through memory, and on a CPU computes what it had fused into it (the
activation's derivative) again in strides: a third of a training step. Here the gradient is `x^T g`.
It also multiplies in the type of the activations and sums in float32, where the automatic rule
would multiply in float32.

The product itself stays a `dot_general`, so that rematerialisation policies see it; its tangent is
a bilinear primitive, so that forward and reverse mode and their compositions work.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def product(x: Array, weight: Array, contract: int = 0) -> Array:
    """`[..., d_in] -> float32[..., d_out]`, summed over axis `contract` of a matrix `weight`.

    The weight is cast to `x.dtype` here, so that its gradient, in its own dtype, is never rounded
    to that of the activations.
    """
    return _plain(x, weight, contract=contract)


@product.defjvp
def _jvp(contract: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, weight), (of_x, of_weight) = primals, tangents
    tangent = _bilinear.bind(of_x, weight, contract=contract)
    value = _plain(x, weight, contract=contract)  # a bare dot_general, or policies would not see it
    return value, tangent + _bilinear.bind(x, of_weight, contract=contract)


def _for_x(gradient: Array, x: Any, weight: Array, *, contract: int) -> Array:
    dtype = x.aval.dtype
    gradient, weight = gradient.astype(dtype), weight.astype(dtype)
    return _dot(gradient, weight, (gradient.ndim - 1,), (1 - contract,)).astype(dtype)


def _for_weight(gradient: Array, x: Array, weight: Any, *, contract: int) -> Array:
    rows = tuple(range(x.ndim - 1))
    pair = (x, gradient.astype(x.dtype)) if contract == 0 else (gradient.astype(x.dtype), x)
    return _dot(*pair, rows, rows).astype(weight.aval.dtype)


def _dot(a: Array, b: Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(
        a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32
    )


def _plain(x: Array, weight: Array, *, contract: int) -> Array:
    def one() -> Array:
        return _dot(x, weight.astype(x.dtype), (x.ndim - 1,), (contract,))

    def two() -> Array:
        rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
        y = _dot(rows, weight.astype(x.dtype), (1,), (contract,))
        return y[:1].reshape(*x.shape[:-1], -1)

    if x.dtype == jnp.bfloat16 and x.size == x.shape[-1]:
        return jax.lax.platform_dependent(cpu=two, default=one)
    return one()


def _mapped(arguments: Any, axes: Any, *, contract: int) -> tuple[Array, int]:
    return jax.vmap(functools.partial(_plain, contract=contract), axes)(*arguments), 0


_bilinear = Primitive("weight_product")
_bilinear.def_impl(jax.jit(_plain, static_argnames="contract"))
_bilinear.def_abstract_eval(
    lambda x, weight, *, contract: ShapedArray(
        (*x.shape[:-1], weight.shape[1 - contract]), jnp.float32
    )
)
mlir.register_lowering(_bilinear, mlir.lower_fun(_plain, multiple_results=False))
batching.primitive_batchers[_bilinear] = _mapped
ad.defbilinear(_bilinear, _for_x, _for_weight)
