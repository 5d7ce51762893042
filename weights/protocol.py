"""What a weight format must be able to do, and the same questions answered for a plain array.

A format is a frozen dataclass registered with `jax.tree_util.register_dataclass`: arrays are its
leaves, sizes and codings are static fields. Under a scan over layers every leaf carries a leading
`[layers]` axis, which `jax.lax.scan` removes before a method below is called, so a format is
written for one matrix `[d_in, d_out]`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Array = jax.Array


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

    @property
    def shape(self) -> tuple[int, ...]:
        """`(d_in, d_out)`, of one matrix of a stack."""
        ...

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        ...

    def nominal_bits(self) -> float:
        """Bits a value as a paper would print them: codes only."""
        ...

    def split_units(self) -> tuple[int, int]:
        """Rows and columns that must stay together when a mesh splits the matrix."""
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
    return weight.nbytes() if is_format(weight) else runtime_nbytes(weight)


def runtime_nbytes(weight: Any) -> int:
    """Bytes that its arrays take as they are, which may be a prepared form."""
    leaves = jax.tree.leaves(weight)
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def size(weight: Any) -> int:
    """Values that a weight stands for, those of all layers of a stack."""
    return weight.size if is_format(weight) else math.prod(weight.shape)


def bits_per_weight(weight: Any) -> float:
    """Honest bits a value: all of the stored form, scales, zeros, tables and indices included."""
    return 8 * nbytes(weight) / size(weight)


def nominal_bits(weight: Any) -> float:
    """Bits a value as a paper would print them: codes only."""
    if is_format(weight):
        return weight.nominal_bits()
    return 8.0 * jnp.dtype(weight.dtype).itemsize


def split_units(weight: Any) -> tuple[int, int]:
    """Rows and columns of a weight that must stay together when a mesh splits it."""
    return weight.split_units() if hasattr(weight, "split_units") else (1, 1)


def separable(weight: Any) -> tuple[bool, bool]:
    """Whether a format's product may be made of parts: of some rows of the input by themselves, and
    of some of the inputs, whose products are then summed. A format that does not say may not.
    """
    return getattr(weight, "separable", (False, False))


def check_split(path: str, weight: Any, degrees: tuple[int, int]) -> None:
    """Raise `ValueError` if a format cannot be cut into so many pieces along its rows and columns.

    Arrays need no more than divisibility, which the mesh itself checks.
    """
    if not hasattr(weight, "split_units"):
        return
    pairs = zip(("inputs", "outputs"), weight.shape, split_units(weight), degrees, strict=True)
    for side, extent, unit, degree in pairs:
        if degree == 1 or extent % (unit * degree) == 0:
            continue
        legal = [n for n in range(1, extent // unit + 1) if extent % (unit * n) == 0] or [1]
        near = sorted(legal, key=lambda n: (abs(n - degree), n))[:3]
        raise ValueError(
            f"{path}: {describe(weight)} cannot be split into {degree} along its {extent} {side}: "
            f"a device holds whole runs of {unit}; nearest degrees that fit: "
            f"{', '.join(map(str, sorted(near)))}"
        )


def describe(weight: Any) -> str:
    """A format in words for a message: `Grouped [4096, 1024] (bits 4, group 128)`."""
    facts = [
        f"{name} {getattr(weight, name)}" for name in ("bits", "group") if hasattr(weight, name)
    ]
    shown = f" ({', '.join(facts)})" if facts else ""
    return f"{type(weight).__name__} {list(weight.shape)}{shown}"


def prepare(weight: Any, backend: str) -> Any:
    """The form that a weight is multiplied in on `backend`."""
    return weight.prepare(backend) if is_format(weight) else weight


def specs(weight: Any, spec: PartitionSpec) -> Any:
    """Partition specs of a weight's own arrays, given the spec of the matrix it stands for."""
    return weight.specs(spec) if is_format(weight) else spec
