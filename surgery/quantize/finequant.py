"""FineQuant: 4 bits without calibration, in groups as fine as each matrix needs (Kim et al., arXiv
2308.09723).

There is no published code, and the paper names no exact statistic: a group is halved here while
the mean range `max - min` of groups shrinks by more than `alpha`. Halving a large group of normal
values shrinks it by 1.05 to 1.10, so that a larger drop is structure (outlier rows, for instance).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery.calibration import Stats
from surgery.quantize.method import Method, Report, check_group
from weights import grouped
from weights.grid import Grid

Array = jax.Array


@dataclass(frozen=True)
class FineQuant(Method):
    """FineQuant, rounding to nearest with a group size chosen for each matrix.

    bits: of a code, 2 to 8.
    alpha: a group is halved while that shrinks the mean range by more than this.
    min_group: the finest group.
    group: input channels that share a scale where nothing else is chosen; -1 is all.
    by_layer: each layer takes the groups that it needs; those that differ are stacked apart.
    choices: (path below a block, or layer/path, and group) pairs that were chosen; leave empty.
    """

    bits: int = 4
    alpha: float = 1.15
    min_group: int = 64
    group: int = -1
    by_layer: bool = False
    choices: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        Grid(self.bits)
        if self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}; it must be above 1, else all groups are finest")

    def check(self, path: str, shape: tuple[int, int]) -> None:
        """The finest groups must fill the matrix."""
        check_group(path, shape[0], self.min_group)

    def plan(self, matrices: Iterable[Mapping[str, Array]]) -> Method:
        """The same with the finest group that any layer needs at each path, so that all are stored
        alike, or with `by_layer` that of each layer.
        """
        choices: dict[str, int] = {}
        for layer, kernels in enumerate(matrices):
            for path, w in kernels.items():
                stack = jnp.asarray(w).reshape(-1, *w.shape[-2:])
                wanted = min(
                    choose_group(mean_ranges(one, self.min_group), self.alpha) for one in stack
                )
                name = self._name(path, layer)
                choices[name] = min(choices.get(name, wanted), wanted)
        return dataclasses.replace(self, choices=tuple(sorted(choices.items())))

    def at(self, path: str, layer: int | None = None) -> Method:
        """With the group chosen for a path, or for it in one layer."""
        group = dict(self.choices).get(self._name(path, layer), self.group)
        return dataclasses.replace(self, group=group, choices=())

    def _name(self, path: str, layer: int | None) -> str:
        return f"{layer}/{path}" if self.by_layer else path

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Grouped` codes of `w [K, N]`, the same levels on both sides of 0."""
        weight = grouped.quantize(w, group=self.group, grid=Grid(self.bits, "odd"))
        return weight, {"group": jnp.asarray(weight.group)}


def mean_ranges(w: Array, min_group: int) -> dict[int, float]:
    """`{group: mean over groups and columns of max - min}` of `w [K, N]`, from one group of all
    rows by halves down to `min_group`.
    """
    group, found = w.shape[0], {}
    while True:
        by_group = w.astype(jnp.float32).reshape(-1, group, w.shape[1])
        ranges = jnp.max(by_group, axis=1) - jnp.min(by_group, axis=1)
        found[group] = float(np.mean(ranges))
        if group % 2 or group // 2 < min_group:
            return found
        group //= 2


def choose_group(ranges: Mapping[int, float], alpha: float) -> int:
    """The group from which halving no longer shrinks the mean range by more than `alpha`."""
    groups = sorted(ranges, reverse=True)
    for group, half in itertools.pairwise(groups):
        if ranges[group] <= alpha * ranges[half]:
            return group
    return groups[-1]
