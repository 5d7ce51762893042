"""What a weight format must be able to do, and the same questions answered for a plain array.

A format is a frozen dataclass registered with `jax.tree_util.register_dataclass`: arrays are its
leaves, sizes and codings are static fields. Under a scan over layers every leaf carries a leading
`[layers]` axis, which `jax.lax.scan` removes before a method below is called, so a format is
written for one matrix `[d_in, d_out]`.
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
    """A stored form of one matrix `[d_in, d_out]`, or of a table `[vocab, d_model]`."""

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """`[..., d_in] -> [..., d_out]` in `x.dtype`, accumulated in float32.

        `rng` is the key of a format's own dropout, if it has one.
        """
        ...

    def lookup(self, ids: Array) -> Array:
        """Rows of a table `[vocab, d_model]`; needed only of formats that may be an embedding."""
        ...

    def matmul_transposed(self, x: Array) -> Array:
        """`x @ table.T` for a tied head; needed only of formats that may be an embedding."""
        ...

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The matrix `[d_in, d_out]` it stands for; `TypeError` if the format is not linear."""
        ...

    def nbytes(self) -> int:
        """Bytes of the stored form, all leaves, scales and indices included."""
        ...

    def prepare(self, backend: str) -> Weight:
        """The run-time form on "cpu", "gpu" or "tpu"; itself where both forms agree."""
        ...

    def specs(self, spec: PartitionSpec) -> Weight:
        """The same structure holding the spec of each stored array, given the matrix's spec."""
        ...


def is_weight(node: Any) -> bool:
    """True for what stands at one path of a params tree: an array (abstract too) or a format."""
    return isinstance(node, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) or is_format(node)


def is_format(node: Any) -> bool:
    """True for a weight format, false for arrays and everything else."""
    return not isinstance(node, type) and all(
        callable(getattr(node, name, None)) for name in ("matmul", "dequantize", "nbytes", "specs")
    )


def dequantize(weight: Any, dtype: Any = jnp.float32) -> Array:
    """The dense `[d_in, d_out]` matrix that a weight stands for."""
    if is_format(weight):
        return weight.dequantize(dtype)
    return jnp.asarray(weight).astype(dtype)


def nbytes(weight: Any) -> int:
    """Bytes that a weight takes in its stored form."""
    if is_format(weight):
        return weight.nbytes()
    return int(np.prod(weight.shape)) * jnp.dtype(weight.dtype).itemsize


def prepare(weight: Any, backend: str) -> Any:
    """The form that a weight is multiplied in on `backend`."""
    return weight.prepare(backend) if is_format(weight) else weight


def specs(weight: Any, spec: PartitionSpec) -> Any:
    """Partition specs of a weight's own arrays, given the spec of the matrix it stands for."""
    return weight.specs(spec) if is_format(weight) else spec
