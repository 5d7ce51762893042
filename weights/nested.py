"""What formats over another weight answer by asking it."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from weights import protocol


class OverBase:
    """Sizes and the prepared form of a format whose `base`, an array or a format, is its matrix."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """`(K, N)`, of one matrix of a stack."""
        return tuple(self.base.shape[-2:])

    @property
    def size(self) -> int:
        """Values it stands for, those of all layers of a stack."""
        return protocol.size(self.base)

    def nbytes(self) -> int:
        """Bytes of the stored form: the base's, and its own arrays'."""
        own = protocol.runtime_nbytes(self) - protocol.runtime_nbytes(self.base)
        return protocol.nbytes(self.base) + own

    def nominal_bits(self) -> float:
        """Those of the base."""
        return protocol.nominal_bits(self.base)

    def prepare(self, backend: str) -> Self:
        """With the base prepared."""
        prepared = protocol.prepare(self.base, backend)
        return dataclasses.replace(self, base=prepared)  # pyright: ignore[reportArgumentType]

    def split_units(self) -> tuple[int, int]:
        """Rows and columns that must stay on one device."""
        return protocol.split_units(self.base)
