"""Rows of one array as sums of rows of another, with the map at hand in both directions, so that
the gradient is the same operation backwards: a gather, where JAX would make a scatter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def move(x: Array, there: Array, back: Array) -> Array:
    """`out[i] = sum_j x[there[i, j]]`: `[m, width] -> [n, width]`; an index out of range adds 0.

    there: `int32[n, q]`.
    back: `int32[m, r]`, the same pairs the other way round: `i` is in `back[a]` as often as `a` is
        in `there[i]`.
    """
    return _move.bind(x, there, back)


def _gather(x: Array, there: Array, back: Array) -> Array:
    rows = jnp.take(x, there, axis=0, mode="fill", fill_value=0)
    return rows[:, 0] if there.shape[1] == 1 else jnp.sum(rows, axis=1)


def _jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, there, back = primals
    return move(x, there, back), move(tangents[0], there, back)


def _transpose(g: Any, x: Any, there: Array, back: Array) -> list[Any]:
    return [None if type(g) is ad.Zero else move(g, back, there), None, None]


def _mapped(arguments: Any, axes: Any) -> tuple[Array, int]:
    return jax.vmap(_gather, axes)(*arguments), 0


_move = Primitive("move_rows")
_move.def_impl(jax.jit(_gather))
_move.def_abstract_eval(lambda x, there, back: ShapedArray((there.shape[0], x.shape[1]), x.dtype))
mlir.register_lowering(_move, mlir.lower_fun(_gather, multiple_results=False))
ad.primitive_jvps[_move] = _jvp
ad.primitive_transposes[_move] = _transpose
batching.primitive_batchers[_move] = _mapped
