"""Checks of one field of a request; the error names the field, as OpenAI's `param` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn


class ParameterError(ValueError):
    """A field that a request may not have so: HTTP 400 with `param` and `code`.

    what: what the field is or does. right: what it must be.
    """

    def __init__(self, param: str, what: str, right: str, code: str = "invalid_value") -> None:
        super().__init__(f"{param} {what}; it must be {right}")
        self.param, self.code = param, code


def refuse(param: str, value: Any, right: str) -> NoReturn:
    """Raise the error for a wrong value."""
    shown = repr(value)
    raise ParameterError(param, f"is {shown if len(shown) <= 80 else shown[:77] + '...'}", right)


def number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    least_excluded: bool = False,
) -> float:
    """A finite number in `[least, most]`, or in `(least, most]`."""
    typed = isinstance(value, int | float) and not isinstance(value, bool)
    if not typed or not math.isfinite(value):
        refuse(name, value, "a finite number")
    if not least <= value <= most or (least_excluded and value == least):
        refuse(name, value, _interval(least, most, least_excluded))
    return float(value)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer in `[least, most]`; true and false are none."""
    right = f"an integer of at least {least}" if most is None else f"an integer {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(name, value, right)
    if value < least or (most is not None and value > most):
        refuse(name, value, right)
    return value


def strings(name: str, value: Any, most: int | None = None) -> tuple[str, ...]:
    """One string or several, none empty."""
    several = (value,) if isinstance(value, str) else value
    listed = isinstance(several, Sequence) and all(isinstance(v, str) and v for v in several)
    if not listed or (most is not None and len(several) > most):
        count = "" if most is None else f" of at most {most}"
        refuse(name, value, f"a string or a list{count} strings, none empty")
    return tuple(dict.fromkeys(several))


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Ids, 0 or more."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        refuse(name, value, "a list of ids")
    return tuple(dict.fromkeys(integer(name, token, 0) for token in value))


def _interval(least: float, most: float, least_excluded: bool) -> str:
    if math.isinf(most):
        return f"{'more than' if least_excluded else 'at least'} {least:g}"
    return f"in {'(' if least_excluded else '['}{least:g}, {most:g}]"
