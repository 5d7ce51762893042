"""How a forward pass runs, apart from what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from kernels_pallas.attention import IMPLEMENTATIONS
from model.remat import POLICIES
from sharding import Layout
from weights import nearest


@dataclass(frozen=True)
class Runtime:
    """How a forward pass runs; hashable, so a static argument of `jax.jit`.

    compute_dtype: of activations and products; norms, softmax and logits are float32.
    remat: what the backward pass recomputes, a name in `model.remat.POLICIES`.
    attention: a name in `kernels_pallas.attention.IMPLEMENTATIONS`; None picks the best.
    layout: mesh and sharding tables; None is a single device.
    scan_unroll: layers per turn of the loop over layers; 0 writes all out (slower to compile).
    """

    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str | None = None
    layout: Layout | None = None
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        if self.remat not in POLICIES:
            near = nearest(self.remat, POLICIES) or ", ".join(POLICIES)
            raise ValueError(f"runtime.remat is {self.remat!r}; nearest: {near}")
        if self.attention is not None and self.attention not in IMPLEMENTATIONS:
            near = nearest(self.attention, IMPLEMENTATIONS) or ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"runtime.attention is {self.attention!r}; nearest: {near}")
        if not jnp.issubdtype(jnp.dtype(self.compute_dtype), jnp.floating):
            raise ValueError(f"runtime.compute_dtype is {self.compute_dtype!r}; use a float type")
        if self.scan_unroll < 0:
            raise ValueError(f"runtime.scan_unroll is {self.scan_unroll}; it must be 0 or more")


DEFAULT_RUNTIME = Runtime()
"""Float32 on one device, nothing recomputed."""
