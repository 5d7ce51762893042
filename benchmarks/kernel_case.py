"""One kernel at one shape, as `benchmarks/kernels_tpu.py` sets it beside a library's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A kernel's call, what it costs by its own `cost.py`, and the library kernel it replaces.

    name: operation, pass and shape, such as "attention forward, llama3_8b".
    function: traceable; takes `shapes`.
    shapes: tuple of pytrees of `jax.ShapeDtypeStruct`.
    flops, bytes: of the roofline.
    unit: the field of `tpu_topology.Generation` that bounds its products ("bfloat16", "int8", ...);
        where the generation has none of it, bfloat16.
    library: the library kernel, or None; takes `library_shapes`, or `shapes` if that is None.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    flops: float
    bytes: float
    unit: str = "bfloat16"
    library: Callable[..., Any] | None = None
    library_shapes: tuple[Any, ...] | None = None
