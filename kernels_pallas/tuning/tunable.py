"""What tuning has to know of a kernel; each says it in the `tune.py` of its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.store import Blocks


@dataclass(frozen=True)
class Case:
    """A call to time.

    function: of `arguments`, traceable; takes its block sizes from `best`.
    arguments: arrays on the device.
    plain: the plain function of the same arguments.
    tolerance: largest difference allowed from `plain`, as a part of its largest absolute value.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    plain: Callable[..., Any]
    tolerance: float


@dataclass(frozen=True)
class Tunable:
    """A kernel and the calls to measure.

    platform: where it runs, "cpu", "tpu" or "gpu".
    shapes: name -> sizes by name.
    keys: sizes and device kind -> the calls, one for each type and option.
    default: the kernel's own block sizes.
    candidates: block sizes worth a try that fit the device.
    case: the call itself, with arrays of the key's sizes.
    """

    platform: str
    shapes: Mapping[str, Mapping[str, int]]
    keys: Callable[[Mapping[str, int], str], Sequence[Key]]
    default: Callable[[Key], Blocks]
    candidates: Callable[[Key], Sequence[Blocks]]
    case: Callable[[Key], Case]
