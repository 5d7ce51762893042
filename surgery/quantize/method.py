"""What a quantization method is: settings, and functions from a matrix to a weight format.

A method is a frozen dataclass of plain settings, so that it is a static argument of compiled
functions and goes into a checkpoint's provenance as it is.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from model import ModelConfig
from surgery.blocks import Site
from surgery.calibration import Stats
from weights import nearest
from weights.codes import group_size

Array = jax.Array
Params = Mapping[str, Any]
Report = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A block at hand: its params, its resolved config, and what its sites were found to read."""

    params: Params
    config: ModelConfig
    stats: Mapping[Site, Stats]


@dataclass(frozen=True)
class Method(abc.ABC):
    """The base of all methods; a method overrides what it needs."""

    @property
    def inputs(self) -> str:
        """What it learns from: "none" needs no calibration, "fp" the inputs of layers in the
        unquantized model, "quantized" those that the already quantized layers give.
        """
        return "none"

    @property
    def wide(self) -> bool:
        """Whether `linear` is to be traced with 64-bit types."""
        return False

    @property
    def takes_experts(self) -> bool:
        """Whether it can quantize experts of a feed-forward, each by what it reads itself."""
        return True

    def prepare(self, stats: Stats) -> Any:
        """What `linear` is given of a site's statistics: made once for all matrices that read it.
        Traced by `jax.jit`.
        """
        return stats

    @abc.abstractmethod
    def linear(self, w: Array, stats: Any) -> tuple[Any, Report]:
        """The weight that replaces `w float32[K, N]`, and scalars for the report; `stats` is what
        `prepare` made, None without calibration. Traced by `jax.jit`.
        """

    def check(self, path: str, shape: tuple[int, int]) -> None:  # noqa: B027
        """Raise `ValueError` naming `path` if a matrix `[K, N]` of this shape cannot be
        quantized.
        """

    def plan(self, matrices: Iterable[Mapping[str, Array]]) -> Method:
        """The method with what it decides from all weights `{path: [K, N]}`, layer by layer,
        before any is changed.
        """
        return self

    def at(self, path: str, layer: int | None = None) -> Method:
        """The method for the matrices at one path, of all layers or of one."""
        return self

    def transform(self, block: Block, targets: frozenset[str]) -> tuple[Block, Report]:
        """An equivalent block that is easier to quantize; the matrices at `targets` will be."""
        return block, {}

    def settings(self) -> dict[str, Any]:
        """As provenance holds them."""
        return dataclasses.asdict(self)


def check_group(path: str, rows: int, group: int) -> None:
    """Raise `ValueError` naming `path` unless groups of `group` rows (-1: all) fill a matrix."""
    try:
        group_size(group, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_choice(field: str, value: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless a setting is one of the known names."""
    if value not in (known := tuple(known)):
        near = nearest(value, known) or ", ".join(known)
        raise ValueError(f"{field}={value!r} is not one of {', '.join(known)}; nearest: {near}")


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise `ValueError` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"{field}={value!r}; it must be {low:g} to {high:g}")
