"""AWQ: input channels that see large activations get finer steps, by a scale that the layer before
takes back (Lin et al., arXiv 2306.00978).

For each site s = a^r with a the mean magnitude of a channel and r searched; then each group's range
is clipped where that loses less. Both losses are squared errors of the outputs of the site's linear
layers over all calibration tokens, which the Gram matrix gives exactly (the authors run the
attention and the feed-forward instead, on a sample).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from surgery.calibration import Stats
from surgery.quantize import transforms
from surgery.quantize.method import Block, Method, Report, check_group
from weights import flatten, grouped
from weights.codes import group_size
from weights.grid import Grid, convention

Array = jax.Array
RATIOS = 20
"""Exponents tried: 0, 1/20, …, 19/20."""
SHRINKS = 10
"""Ranges tried: 1, 19/20, …, 11/20 of a group's largest magnitude."""
HIGHEST = jax.lax.Precision.HIGHEST
UNCLIPPED = ("/query/kernel", "/key/kernel")


@dataclass(frozen=True)
class AWQ(Method):
    """AWQ, activation-aware scales and clipping, then rounding to nearest.

    bits: of a code, 2 to 8.
    group: input channels that share a scale; -1 is all.
    clip: search a smaller range of each group (never of queries and keys).
    shared_values: scale values that several query heads share too; the authors leave them.
    """

    bits: int = 4
    group: int = 128
    clip: bool = True
    shared_values: bool = False

    def __post_init__(self) -> None:
        Grid(self.bits)

    @property
    def inputs(self) -> str:
        """Those of the unquantized model."""
        return "fp"

    @property
    def takes_experts(self) -> bool:
        """No: the experts of a layer would have to agree on one scale."""
        return False

    def check(self, path: str, shape: tuple[int, int]) -> None:
        """Groups must fill the matrix."""
        check_group(path, shape[0], self.group)

    def at(self, path: str, layer: int | None = None) -> Method:
        """Queries and keys are not clipped: their product would lose more."""
        return dataclasses.replace(self, clip=False) if path.endswith(UNCLIPPED) else self

    def transform(self, block: Block, targets: frozenset[str]) -> tuple[Block, Report]:
        """The block with every site scaled that can be."""
        params, stats, report = block.params, dict(block.stats), {}
        for site, found in block.stats.items():
            fold = transforms.fold_of(params, block.config, site)
            linears = [path for path in site.linears if path in targets]
            if fold is None or not linears or (fold.shared and not self.shared_values):
                continue
            now = flatten(params)
            w = jnp.concatenate([now[path].astype(jnp.float32) for path in linears], axis=1)
            magnitude = transforms.shared_scale(fold, found.absmean)
            s, ratio = search(self, w, found.gram, magnitude)
            params = transforms.scale(params, fold, s)
            stats[site] = found.scaled(1 / s)
            report.update({path: {"ratio": ratio} for path in linears})
        return Block(params, block.config, stats), report

    def linear(self, w: Array, stats: Stats | None) -> tuple[Any, Report]:
        """`Grouped` codes of `w [K, N]`, clipped first."""
        assert stats is not None
        w, kept = clipped(self, w, stats.gram) if self.clip else (w, jnp.ones(()))
        return self.round(w), {"kept_range": kept}

    def round(self, w: Array) -> grouped.Grouped:
        """To nearest; ranges need not hold 0, zeros are whole and within the codes."""
        return grouped.quantize(w, group=self.group, grid=convention("awq", self.bits))


@functools.partial(jax.jit, static_argnums=0)
def search(method: AWQ, w: Array, gram: Array, magnitude: Array) -> tuple[Array, Array]:
    """The scale `[K]` that loses least over the linear layers `w [K, N]` of a site, and its
    exponent; `magnitude [K]` is the mean magnitude of each channel.
    """

    def scale_of(ratio: Array) -> Array:
        s = jnp.maximum(magnitude**ratio, 1e-4)
        return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

    def loss(ratio: Array) -> Array:
        s = scale_of(ratio)[:, None]
        delta = method.round(w * s).dequantize() / s - w
        return jnp.sum(delta * jnp.matmul(gram, delta, precision=HIGHEST))

    ratios = jnp.arange(RATIOS) / RATIOS
    best = ratios[jnp.argmin(jax.lax.map(loss, ratios))]
    return scale_of(best), best


@functools.partial(jax.jit, static_argnums=0)
def clipped(method: AWQ, w: Array, gram: Array) -> tuple[Array, Array]:
    """`w [K, N]` with each group and column clamped where that loses least, and the mean share of
    their ranges that is kept.
    """
    rows, columns = w.shape
    group = group_size(method.group, rows)
    count = rows // group
    by_group = w.reshape(count, group, columns)
    own = jnp.arange(count)
    blocks = gram.reshape(count, group, count, group)[own, :, own]
    most = jnp.max(jnp.abs(by_group), axis=1, keepdims=True)

    def clamped(share: Array) -> Array:
        return jnp.clip(by_group, -most * share, most * share)

    def loss(share: Array) -> Array:
        rounded = method.round(clamped(share).reshape(w.shape)).dequantize()
        delta = rounded.reshape(by_group.shape) - by_group
        return jnp.sum(delta * jnp.matmul(blocks, delta, precision=HIGHEST), axis=1)

    shares = 1 - jnp.arange(SHRINKS) / 20
    best = shares[jnp.argmin(jax.lax.map(loss, shares), axis=0)]
    return clamped(best[:, None, :]).reshape(w.shape), jnp.mean(best)
