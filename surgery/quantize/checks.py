"""What a quantization refuses: values that are not finite, and windows that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from model import Runtime
from surgery.quantize.method import Method, Params
from weights import flatten, is_format


def check_finite(params: Params, where: str) -> None:
    """Raise `ValueError` naming the first array that holds NaN or infinity."""
    for path, leaf in flatten(params).items():
        if is_format(leaf):
            continue
        wrong = int(jnp.sum(~jnp.isfinite(leaf)))
        if wrong:
            raise ValueError(f"{where}{path} holds {wrong:,} values that are not finite")


def checked_tokens(tokens: np.ndarray | None, method: Method, runtime: Runtime) -> np.ndarray:
    """The windows; raises `ValueError` if there are none, or if they do not divide over devices."""
    if tokens is None:
        raise ValueError(
            f"{type(method).__name__} learns from the inputs of layers: give calibration text "
            "(--data=FILE)"
        )
    parts = 1 if runtime.layout is None else runtime.layout.size("batch")
    if len(tokens) % parts:
        raise ValueError(
            f"{len(tokens)} calibration windows do not divide over {parts} devices; take "
            f"{len(tokens) // parts * parts or parts}"
        )
    return tokens


def check_result(layer: int, path: str, row: Mapping[str, Any]) -> None:
    """Raise `ValueError` if what a report's row tells of is not finite."""
    loss = np.asarray(row.get("weight_error"))
    if not np.all(np.isfinite(loss)):
        raise ValueError(
            f"layer {layer} {path}: the result is not finite (damping {row.get('damping')}); give "
            "more calibration windows or a larger --damping"
        )
