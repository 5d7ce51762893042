"""What the computation says about a model's matrices, where names say nothing.

Two matrix products of which the first's output reaches the second's contracted axis through
elementwise operations only form a pair: split the first by columns and the second by rows, and
nothing is sent between them (Megatron-LM, Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from weights import path_string

CARRIES_PARAMS = {"convert_element_type", "copy", "reshape", "squeeze", "stop_gradient", "slice"}
"""Operations whose output is still the parameter that went in."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of one value.

    param: path of the parameter that it is.
    direct: matrices whose product it equals, up to elementwise operations.
    mixed: matrices on whose products it depends in any other way.
    """

    param: str | None = None
    direct: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()


def column_row_pairs(
    apply: Callable[..., Any], params: Any, *inputs: Any
) -> tuple[tuple[str, str], ...]:
    """Paths of the two matrices of each pair in the graph of `apply(params, *inputs)`.

    Nothing is computed: params and inputs may be `jax.ShapeDtypeStruct`.
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    names = [path_string(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = [_Value(param=name) for name in names]
    known += [_Value()] * (len(closed.jaxpr.invars) - len(known))
    pairs: dict[tuple[str, str], None] = {}
    _walk(closed.jaxpr, known, pairs)
    return tuple(pairs)


def _walk(jaxpr: Jaxpr, known: list[_Value], pairs: dict[tuple[str, str], None]) -> list[_Value]:
    values: dict[Any, _Value] = dict(zip(jaxpr.invars, known, strict=True))

    def read(variable: Any) -> _Value:
        return _Value() if isinstance(variable, Literal) else values.get(variable, _Value())

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        outputs = _through(equation, inputs, pairs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _through(
    equation: Any, inputs: list[_Value], pairs: dict[tuple[str, str], None]
) -> list[_Value]:
    inner = _inner_jaxpr(equation)
    if inner is not None and len(inner.invars) == len(inputs):
        return _walk(inner, inputs, pairs)[: len(equation.outvars)]
    name = equation.primitive.name
    if name == "dot_general":
        return [_product(equation, inputs, pairs)]
    if name in CARRIES_PARAMS and inputs[0].param is not None:
        return [inputs[0]] * len(equation.outvars)
    return [_other(equation, variable, inputs) for variable in equation.outvars]


def _inner_jaxpr(equation: Any) -> Jaxpr | None:
    for value in equation.params.values():
        if isinstance(value, ClosedJaxpr):
            return value.jaxpr
        if isinstance(value, Jaxpr):
            return value
    return None


def _product(equation: Any, inputs: list[_Value], pairs: dict[tuple[str, str], None]) -> _Value:
    """A product with a parameter starts a chain, and ends those that reach its contracted axis."""
    mixed = frozenset().union(*(value.direct | value.mixed for value in inputs))
    weights = [value.param for value in inputs if value.param is not None]
    if len(weights) != 1:
        return _Value(mixed=mixed)
    side = 0 if inputs[0].param is None else 1
    contracted = equation.params["dimension_numbers"][0][side]
    last = len(equation.invars[side].aval.shape) - 1
    if tuple(contracted) == (last,):
        for first in sorted(inputs[side].direct - inputs[side].mixed):
            pairs[first, weights[0]] = None
    return _Value(direct=frozenset(weights), mixed=mixed - frozenset(weights))


def _other(equation: Any, output: Any, inputs: list[_Value]) -> _Value:
    """Elementwise operations keep a chain; all else only leaves a trace of it."""
    shape = output.aval.shape
    keeps = all(
        variable.aval.shape in (shape, ()) for variable in equation.invars
    ) and equation.primitive.name not in ("sort", "cumsum", "rev")
    direct = frozenset().union(*(value.direct for value in inputs))
    mixed = frozenset().union(*(value.mixed for value in inputs))
    return _Value(direct=direct, mixed=mixed) if keeps else _Value(mixed=mixed | direct)
