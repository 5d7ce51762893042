"""What a weight format must be able to do, and the same questions answered for a plain array.

A format is a frozen dataclass registered with `jax.tree_util.register_dataclass`: arrays are its leaves, sizes and
codings are static fields. Under a scan over layers every leaf carries a leading `[layers]` axis, which `jax.lax.scan`
removes before a method below is called, so a format is written for one matrix `[d_in, d_out]`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Array = jax.Array


@runtime_checkable
class Weight(Protocol):
    """A stored form of one matrix `[d_in, d_out]`."""

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., d_in] -> [..., d_out]` in `x.dtype`, accumulated in float32; `rng` drives dropout if any."""
        ...

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The matrix `[d_in, d_out]` it stands for; raises `TypeError` if the format is not linear in x."""
        ...

    def nbytes(self) -> int:
        """Bytes of the stored form, all leaves, scales and indices included."""
        ...

    def prepare(self, backend: str) -> Weight:
        """The run-time form on a backend ("cpu", "gpu", "tpu"); itself where storage and run time agree."""
        ...

    def specs(self, spec: PartitionSpec) -> Weight:
        """Given the partition spec of the matrix, the same structure with the spec of each stored array."""
        ...


def is_weight(node: Any) -> bool:
    """True for what stands at one path of a params tree: an array, an abstract array, or a format."""
    return isinstance(node, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) or _is_format(node)


def _is_format(node: Any) -> bool:
    return not isinstance(node, type) and all(
        callable(getattr(node, name, None)) for name in ("matmul", "dequantize", "nbytes", "specs")
    )


def dequantize(weight: Any, dtype: Any = jnp.float32) -> Array:
    """The dense `[d_in, d_out]` matrix that a weight stands for."""
    if _is_format(weight):
        return weight.dequantize(dtype)
    return jnp.asarray(weight).astype(dtype)


def nbytes(weight: Any) -> int:
    """Bytes that a weight takes in its stored form."""
    if _is_format(weight):
        return weight.nbytes()
    return int(np.prod(weight.shape)) * jnp.dtype(weight.dtype).itemsize


def prepare(weight: Any, backend: str) -> Any:
    """The form that a weight is multiplied in on `backend`."""
    return weight.prepare(backend) if _is_format(weight) else weight


def specs(weight: Any, spec: PartitionSpec) -> Any:
    """Partition specs of a weight's own arrays, given the spec of the matrix it stands for."""
    return weight.specs(spec) if _is_format(weight) else spec
