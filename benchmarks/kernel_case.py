"""One kernel at one shape, as `benchmarks/kernels_tpu.py` sets it beside other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rival:
    """Another program for what a kernel computes.

    name: as the table has it.
    function: traceable; takes `shapes`.
    shapes: as of `Case`; None is those of the case.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Case:
    """A kernel's call, what it costs by its own `cost.py`, and what it is set beside.

    name: operation, pass and shape, such as "attention forward, llama3_8b".
    function: traceable; takes `shapes`.
    shapes: tuple of pytrees of `jax.ShapeDtypeStruct`.
    flops, bytes: of the roofline.
    unit: the field of `tpu_topology.Generation` that bounds its products ("bfloat16", "int8", ...);
        where the generation has none of it, bfloat16.
    library: the library kernel that it would replace.
    xla: XLA's own way, for a quantized product to dequantize and multiply; the kernel is kept only
        where it is better.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    flops: float
    bytes: float
    unit: str = "bfloat16"
    library: Rival | None = None
    xla: Rival | None = None
