"""What a choice of block sizes was made for, and the version of the code that it was made with."""

from __future__ import annotations

import ast
import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kernels_pallas.target import current_target
from kernels_pallas.tpu_topology import GENERATIONS, generation_of

ROOM = Path(__file__).parents[1]
FARTHEST = 2.0
"""Octaves that a size may be from the measured one."""


@dataclass(frozen=True)
class Key:
    """One call of a kernel, as far as its block sizes depend on it.

    kernel: "folder.module" of the code that takes the block sizes, such as "grouped_matmul.blocks";
        the module and those named after it (`module_*.py`) are its version.
    device_kind: `device_name` of a `jax.Device.device_kind`.
    sizes: name and size, sorted; what was measured for near sizes serves as well.
    dtype: of the operands.
    options: name and value, sorted; these must agree.
    """

    kernel: str
    device_kind: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(
        kernel: str,
        sizes: Mapping[str, int],
        dtype: Any,
        device_kind: str | None = None,
        **options: bool | int | str | None,
    ) -> Key:
        """A key from names and values; `device_kind` None is the device being compiled for."""
        return Key(
            kernel,
            device_name(current_target().device_kind if device_kind is None else device_kind),
            tuple(sorted((name, int(size)) for name, size in sizes.items())),
            dtype if isinstance(dtype, str) else jnp.dtype(dtype).name,
            tuple(sorted(options.items())),
        )

    def bucket(self) -> Key:
        """The key that a choice is kept under: every size rounded up to a power of two."""
        return replace(self, sizes=tuple((name, _power(size)) for name, size in self.sizes))

    def distance(self, other: Key) -> float | None:
        """Octaves between two keys, added over the sizes; None where one says nothing about the
        other.
        """
        if self.kernel != other.kernel or self._exact() != other._exact():
            return None
        apart = [
            abs(math.log2(max(mine, 1) / max(theirs, 1)))
            for (_, mine), (_, theirs) in zip(self.sizes, other.sizes, strict=True)
        ]
        return sum(apart) if max(apart, default=0.0) <= FARTHEST else None

    def _exact(self) -> tuple[Any, ...]:
        """What must agree."""
        names = tuple(name for name, _ in self.sizes)
        return self.device_kind, self.dtype, self.options, names

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in (*self.options, *self.sizes)]
        return f"{self.kernel} {self.dtype} {' '.join(parts)} on {self.device_kind}"


def device_name(device_kind: str) -> str:
    """One name for a TPU generation that has two; other devices as they are."""
    generation = generation_of(device_kind)
    return device_kind if generation is None else GENERATIONS[generation].device_kind


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def code_version(kernel: str) -> str:
    """Hash of the code of a kernel ("folder.module"), without comments, docstrings and layout."""
    folder, _, module = kernel.partition(".")
    files = [*ROOM.glob(f"{folder}/{module}.py"), *ROOM.glob(f"{folder}/{module}_*.py")]
    if not files:
        raise ValueError(f"kernel {kernel!r} has no code at kernels_pallas/{folder}/{module}.py")
    return version_of("\n".join(path.read_text("utf-8") for path in sorted(files)))


def is_current(kernel: str, version: str) -> bool:
    """Whether a version is that of a kernel's code, and there is such a kernel."""
    try:
        return code_version(kernel) == version
    except ValueError:
        return False


def version_of(text: str) -> str:
    """Hash of Python code; comments, docstrings and layout do not count."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [one for one in body if not _is_text(one)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _is_text(node: Any) -> bool:
    value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
