"""Attention by the name of its implementation; every implementation computes what
`reference.attention` defines.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from kernels_pallas.attention import reference

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"plain": reference.attention}
"""Name -> function with the signature of `reference.attention`."""


def attention(*args: Any, implementation: str | None = None, **options: Any) -> Any:
    """`reference.attention` by a named implementation; None picks the best one for the current
    backend.

    Raises `ValueError` naming the nearest known implementation.
    """
    name = implementation or "plain"
    if name not in IMPLEMENTATIONS:
        near = ", ".join(difflib.get_close_matches(name, IMPLEMENTATIONS, cutoff=0.0))
        raise ValueError(f"attention implementation {name!r} is not known; nearest: {near}")
    return IMPLEMENTATIONS[name](*args, **options)
