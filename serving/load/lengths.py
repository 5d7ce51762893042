"""Distributions of lengths, as a flag spells them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

KINDS = {"fixed": 1, "uniform": 2, "lognormal": 2}
"""Kinds by the number of their values."""


@dataclass(frozen=True)
class Lengths:
    """`fixed` n; `uniform` least, most; or `lognormal` median, deviation of the logarithm."""

    kind: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Lengths:
        """Read `128`, `uniform:8,256` or `lognormal:128,0.5`. Raises `ValueError` naming `name`."""
        kind, colon, rest = text.partition(":")
        if not colon:
            kind, rest = "fixed", text
        try:
            values = tuple(float(part) for part in rest.split(","))
        except ValueError:
            values = ()
        finite = all(math.isfinite(value) and value > 0 for value in values)
        whole = kind == "lognormal" or all(value == int(value) for value in values if finite)
        ordered = kind != "uniform" or list(values) == sorted(values)
        if len(values) != KINDS.get(kind) or not (finite and whole and ordered):
            raise ValueError(
                f"{name} is {text!r}; it must be like 128, uniform:8,256 (least, most) or "
                "lognormal:128,0.5 (median, deviation of the logarithm)"
            )
        return cls(kind, values)

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """So many lengths, each at least 1."""
        if self.kind == "fixed":
            return [int(self.values[0])] * count
        if self.kind == "uniform":
            least, most = map(int, self.values)
            return rng.integers(least, most, count, endpoint=True).tolist()
        median, deviation = self.values
        drawn = rng.lognormal(math.log(median), deviation, count)
        return np.maximum(np.rint(drawn), 1).astype(int).tolist()
