"""Columns of a weight, and weights side by side: what a tensor that holds several of ours needs.

Some families store query, key and value (or gate and up) as one linear layer. Its columns are taken
apart when a file is read and put together when one is written; no code changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from weights import grouped, lut, second_order
from weights.grouped import Grouped
from weights.int8 import Int8
from weights.interop.layout import LayoutError
from weights.lut import Lut
from weights.permuted import Permuted
from weights.second_order import SecondOrder, values_of


def take_columns(weight: Any, columns: np.ndarray) -> Any:
    """The columns `int[n]` of a weight `[K, N]`, in this order, as a weight `[K, n]`.

    Scales that were coded again in blocks stay so where the columns are whole blocks in a row;
    otherwise they are spread out as float32.
    """
    if isinstance(weight, Permuted):
        return Permuted(take_columns(weight.base, columns), weight.perm)
    if isinstance(weight, Int8):
        return dataclasses.replace(weight, q=weight.q[:, columns], scale=weight.scale[columns])
    if isinstance(weight, Grouped):
        return grouped.from_codes(
            grouped.codes_of(weight)[:, columns],
            _slot(weight.scale, columns),
            _slot(weight.zero, columns),
            bits=weight.bits,
            group=weight.group,
        )
    if isinstance(weight, Lut) and weight.select is None:
        return lut.from_codes(
            lut.codes_of(weight)[:, columns],
            weight.table[0],
            _slot(weight.scale, columns),
            group=weight.group,
            offset=_slot(weight.offset, columns),
        )
    raise LayoutError(f"columns of a {type(weight).__name__} like this cannot be taken")


def join_columns(parts: Sequence[Any], columns: Sequence[np.ndarray]) -> Any:
    """The inverse of `take_columns`: column `columns[p][j]` of the result is column j of part p.

    Raises:
        LayoutError: parts that one module cannot hold, naming what differs.
    """
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise LayoutError(f"parts of one module are of several formats: {kinds}")
    if isinstance(first, Permuted):
        _same(parts, "order of inputs", lambda part: np.asarray(part.perm).tolist(), shown=False)
        return Permuted(join_columns([part.base for part in parts], columns), first.perm)
    place = np.argsort(np.concatenate(columns))

    def joined(arrays: Sequence[Any]) -> Any:
        return jnp.concatenate([jnp.asarray(array) for array in arrays], axis=-1)[..., place]

    if isinstance(first, Int8):
        return dataclasses.replace(
            first, q=joined([p.q for p in parts]), scale=joined([p.scale for p in parts])
        )
    _same(parts, "bits", lambda part: part.bits)
    _same(parts, "group", lambda part: part.group)
    if isinstance(first, Grouped):
        codes = joined([grouped.codes_of(part) for part in parts])
        scale = joined([values_of(part.scale) for part in parts])
        zero = _joined_zeros(parts, joined)
        return grouped.from_codes(codes, scale, zero, bits=first.bits, group=first.group)
    if isinstance(first, Lut) and all(p.select is None and p.offset is None for p in parts):
        _same(parts, "table", lambda part: np.asarray(part.table).tolist(), shown=False)
        scale = _joined_blocks([part.scale for part in parts], columns)
        if scale is None:
            scale = joined([values_of(part.scale) for part in parts])
        codes = joined([lut.codes_of(part) for part in parts])
        return lut.from_codes(codes, first.table[0], scale, group=first.group)
    raise LayoutError(f"columns of a {type(first).__name__} like this cannot be put together")


def alike(layers: Sequence[Any]) -> list[Any]:
    """The same matrices, in one form that `weights.stack` accepts.

    Where some have an order of inputs or zeros of their own, the others get the order that is and
    the zeros in the middle, written out.
    """
    if any(isinstance(layer, Permuted) for layer in layers):
        bases = alike([layer.base if isinstance(layer, Permuted) else layer for layer in layers])
        return [
            Permuted(base, layer.perm if isinstance(layer, Permuted) else _identity(base))
            for base, layer in zip(bases, layers, strict=True)
        ]
    if not all(isinstance(layer, Grouped) for layer in layers):
        return list(layers)
    kinds = {type(layer.zero) for layer in layers}
    if len(kinds) == 1:
        return list(layers)
    packed = all(_whole(layer.zero) for layer in layers)
    form = _packed if packed else _numbers
    return [dataclasses.replace(layer, zero=form(_zeros(layer), layer.bits)) for layer in layers]


def _identity(weight: Any) -> Any:
    return jnp.arange(weight.shape[0], dtype=jnp.int32)


def _packed(zeros: Any, bits: int) -> Any:
    return second_order.whole(zeros.astype(jnp.int32), bits)


def _numbers(zeros: Any, bits: int) -> Any:
    return zeros.astype(jnp.float16)


def _zeros(weight: Grouped) -> Any:
    """Zeros `[G, N]`, those in the middle written out."""
    if weight.zero is not None:
        return values_of(weight.zero)
    return jnp.full((weight.groups, weight.shape[1]), 2 ** (weight.bits - 1), jnp.float32)


def _joined_zeros(parts: Sequence[Grouped], joined: Callable[..., Any]) -> Any:
    if all(part.zero is None for part in parts):
        return None
    zeros = joined([_zeros(part) for part in parts])
    return zeros.astype(jnp.int32) if all(_whole(part.zero) for part in parts) else zeros


def _whole(part: Any) -> bool:
    """Whether a slot holds nothing, or whole numbers as `second_order.whole` packs them."""
    if part is None:
        return True
    inner = ("scale", "zero", "offset", "table")
    return isinstance(part, SecondOrder) and all(getattr(part, name) is None for name in inner)


def _slot(part: Any, columns: np.ndarray) -> Any:
    if not isinstance(part, SecondOrder):
        return None if part is None else part[:, columns]
    values = part.materialise()[:, columns]
    if _whole(part):
        return values.astype(jnp.int32)
    blocks = _blocks(part, columns)
    return values if blocks is None else blocks


def _blocks(part: SecondOrder, columns: np.ndarray) -> SecondOrder | None:
    """The coded columns, if they are whole blocks of the sequence one after the other."""
    groups, width = part.shape
    first, end = int(columns[0]), int(columns[-1]) + 1
    start, stop = first * groups, end * groups
    in_a_row = part.order == "columns" and np.array_equal(columns, np.arange(first, end))
    if not in_a_row or start % part.group or (stop % part.group and end != width):
        return None
    cut = slice(start // part.group, -(-stop // part.group))
    arrays: dict[str, Any] = {
        "scale": None if part.scale is None else part.scale[cut],
        "zero": None if part.zero is None else part.zero[cut],
        "offset": part.offset,
        "table": part.table,
    }
    return second_order.from_codes(
        second_order.codes_of(part)[start:stop],
        (groups, end - first),
        bits=part.bits,
        group=part.group,
        **{name: array for name, array in arrays.items() if array is not None},
    )


def _joined_blocks(parts: Sequence[Any], columns: Sequence[np.ndarray]) -> SecondOrder | None:
    """Coded scales side by side, if they were taken from one sequence of blocks."""
    order = sorted(range(len(parts)), key=lambda index: columns[index][0])
    parts, taken = [parts[i] for i in order], np.concatenate([columns[i] for i in order])
    if not np.array_equal(taken, np.arange(len(taken))):
        return None
    if not all(isinstance(part, SecondOrder) and part.order == "columns" for part in parts):
        return None
    first, sizes = parts[0], [part.shape[0] * part.shape[1] for part in parts]
    if any(size % first.group for size in sizes[:-1]):
        return None
    if any(_frame(part) != _frame(first) or part.scale is None for part in parts):
        return None
    shared: dict[str, Any] = {"offset": first.offset, "table": first.table}
    return second_order.from_codes(
        jnp.concatenate([second_order.codes_of(part) for part in parts]),
        (first.shape[0], len(taken)),
        bits=first.bits,
        group=first.group,
        scale=jnp.concatenate([part.scale for part in parts]),
        **{name: array for name, array in shared.items() if array is not None},
    )


def _frame(part: SecondOrder) -> Any:
    """What all blocks of one sequence share."""
    arrays = (part.zero, part.offset, part.table)
    held = [None if array is None else np.asarray(array).tolist() for array in arrays]
    return part.bits, part.group, part.shape[0], held


def _same(
    parts: Sequence[Any], name: str, value: Callable[[Any], Any], *, shown: bool = True
) -> None:
    values = [value(part) for part in parts]
    for found in values[1:]:
        if found != values[0]:
            what = f": {values[0]} and {found}" if shown else ""
            raise LayoutError(f"parts of one module differ in {name}{what}")
