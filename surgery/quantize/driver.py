"""Block by block through a model: what its linear layers read, and new weights for them.

Only one block's weights are at hand at a time, and the hidden states of all calibration windows
before it. A method says whether it learns from the inputs that the unquantized model gives or from
those of the layers already quantized.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model import Runtime, abstract, rules
from sharding import partition
from surgery import blocks, calibration, experts
from surgery.blocks import Site
from surgery.calibration import Stats
from surgery.quantize.checks import check_finite, check_result, checked_tokens
from surgery.quantize.errors import errors
from surgery.quantize.method import Block, Method, Params
from surgery.quantize.options import KEEP, Options
from surgery.report import with_stored_bits
from surgery.source import Source
from surgery.statistics import SavedStatistics
from surgery.work import Work
from weights import flatten, from_flat, is_format, nearest, trimmed

Array = jax.Array
Progress = Callable[[int, int, str], None]
EQUAL = 1e-4
"""Largest difference of a transformed block's output, of its largest value: rounding is far less, a
wrong transform far more.
"""


def quantize(
    source: Source,
    method: Method,
    tokens: np.ndarray | None = None,
    *,
    options: Options | None = None,
    runtime: Runtime | None = None,
    work: Work | None = None,
    statistics: SavedStatistics | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The params of a model with its linear layers quantized, and a report row for each of them.

    Args:
        source: the model.
        method: of `surgery.METHODS`.
        tokens: `int32[windows, length]` for methods that calibrate.
        options: what to quantize.
        runtime: compute dtype and layout of the calibration passes.
        work: where finished layers go; None is memory. One that holds finished layers is gone on
            with.
        statistics: those of methods that learn from the unquantized model; read if they are whole,
            else made and kept.
        progress: called with (layers done, all layers, what is going on).

    Raises:
        ValueError: settings that do not fit the model, values that are not finite, too few windows.
    """
    run = _Run(
        source,
        method,
        tokens,
        options or Options(),
        runtime or Runtime(),
        work or Work(source.config),
        statistics if method.inputs == "fp" else None,
        progress or (lambda done, total, text: None),
    )
    return run.run()


@dataclass
class _Run:
    source: Source
    method: Method
    tokens: np.ndarray | None
    options: Options
    runtime: Runtime
    work: Work
    statistics: SavedStatistics | None
    progress: Progress
    known: bool = False
    """Whether the statistics are known before: then only the first windows run along."""

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        config = self.source.config
        check_targets(self.source, self.method, self.options)
        outer = self.source.outer()
        check_finite(outer, "")
        self.method = self.method.plan(self._matrices())
        if self.statistics is not None:
            self.known = self.statistics.whole(config.num_layers)
        if self.method.inputs != "none":
            self.tokens = checked_tokens(self.tokens, self.method, self.runtime)
            if self.work.done == 0:
                self._embed(outer)
        for layer in range(self.work.done, config.num_layers):
            began = time.monotonic()
            params = self._place(layer, self.source.layer(layer))
            params, rows = self._layer(layer, params)
            self.work.put(layer, jax.device_get(params), rows)
            text = f"{time.monotonic() - began:.1f} s a layer"
            self.progress(layer + 1, config.num_layers, text)
        params = {**outer, "layers": trimmed(self.work.layers())}
        return params, with_stored_bits(self.work.rows, params, config)

    def _layer(self, layer: int, params: Params) -> tuple[Params, list[dict[str, Any]]]:
        """One block quantized; the hidden states after it are left in the work."""
        check_finite(params, f"layer {layer} ")
        for path in blocks.linear_paths(params):
            if is_format(flatten(params)[path]):
                raise ValueError(f"layer {layer} {path} is quantized already; give plain arrays")
        targets = [path for path in blocks.linear_paths(params) if self.options.wants(path)]
        if self.method.inputs == "none":
            return self._replace(layer, params, targets, {})
        config = self.source.config.layer(layer)
        sites = blocks.sites(params, config, self.runtime)
        one_by_one = self.method.inputs == "quantized" and self.options.order == "sequential"
        rows: list[dict[str, Any]] = []
        for group in [(site,) for site in sites] if one_by_one else [sites]:
            group = tuple(site for site in group if set(site.linears) & set(targets))
            if not group and one_by_one:
                continue
            stats = self._stats(layer, params, group, sites)
            view = Block(params, config, stats)
            view, report = self.method.transform(view, frozenset(targets))
            if view.params is not params:
                self._check_equal(layer, params, view.params)
            known = {path: stat for site, stat in view.stats.items() for path in site.linears}
            ours = [path for site in group for path in site.linears if path in targets]
            params, more = self._replace(layer, view.params, ours, known, report)
            rows += more
        if self.method.inputs == "quantized":
            self._advance(layer, params)
        return params, rows

    def _replace(
        self,
        layer: int,
        params: Params,
        paths: Iterable[str],
        stats: Mapping[str, Stats],
        report: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[Params, list[dict[str, Any]]]:
        """The kernels at `paths` quantized, and the rows of the report."""
        found, rows, shared = flatten(params), [], _Shared(None, None, None)
        for path in paths:
            began = time.monotonic()
            method, own = self.method.at(path, layer), stats.get(path)
            w = self._by_columns(found[path].astype(jnp.float32))
            with jax.enable_x64(method.wide or jax.config.read("jax_enable_x64")):
                if blocks.is_expert(path):
                    weight, notes = _experts(method, w, own)
                else:
                    shared = shared.of(method, own)
                    weight, notes = _linear(method, w, shared.prepared)
            notes = {**(report or {}).get(path, {}), **notes, **errors(w, weight, own)}
            if own is not None and own.count.ndim:
                notes["tokens"] = own.count
                notes["pooled"] = experts.pooled_share(own.count, w.shape[-2])
            notes = {key: np.asarray(value).tolist() for key, value in notes.items()}
            seconds = round(time.monotonic() - began, 3)
            row = {"layer": layer, "path": path, "shape": list(w.shape), **notes}
            rows.append({**row, "seconds": seconds})
            check_result(layer, path, row)
            found[path] = weight
        return from_flat(found), rows

    def _embed(self, outer: Params) -> None:
        assert self.tokens is not None
        for rows, out in self._batches(0, write=0):
            tokens = self._on_devices(self.tokens[rows])
            out[rows] = np.asarray(
                blocks.embed(blocks.without_layers(outer), tokens, self.source.config, self.runtime)
            )

    def _stats(
        self, layer: int, params: Params, wanted: tuple[Site, ...], every: tuple[Site, ...]
    ) -> dict[Site, Stats]:
        """Statistics of the sites wanted: measured, or those saved; what is kept has every site."""
        if self.statistics is None:
            found = self._measure(layer, params, wanted)
        elif self.known:
            saved = self.statistics.read(layer, wanted)
            found = {site: self._whole(one) for site, one in saved.items()}
            self._advance(layer, params)
        else:
            began = time.monotonic()
            found = self._measure(layer, params, every)
            self.statistics.write(layer, found, time.monotonic() - began)
        pooled = {s: experts.pooled(one) if one.count.ndim else one for s, one in found.items()}
        return {site: pooled[site] for site in wanted}

    def _measure(self, layer: int, params: Params, sites: tuple[Site, ...]) -> dict[Site, Stats]:
        """Statistics of sites over all windows. Methods that learn from the unquantized model have
        the hidden states after the block written in the same pass.
        """
        config, weights = self.source.config.layer(layer), flatten(params)
        parts = self._parts()
        stats = {}
        for site in sites:
            *stack, width, _ = weights[site.linears[0]].shape
            stats[site.name] = calibration.empty(width, parts, *stack)
        place = {
            name: calibration.shardings(one, self.runtime.layout) for name, one in stats.items()
        }
        stats = jax.device_put(stats, place)
        forward = self.method.inputs == "fp"
        for rows, out in self._batches(layer, write=layer + 1):
            hidden = self._on_devices(self._hidden(layer)[rows])
            after, stats = blocks.accumulate(
                params, hidden, stats, config, self.runtime, sites, forward
            )
            if after is not None:
                out[rows] = np.asarray(after)
        return {site: self._whole(calibration.finish(stats[site.name])) for site in sites}

    def _advance(self, layer: int, params: Params) -> None:
        """Write the hidden states after a block."""
        config = self.source.config.layer(layer)
        for rows, out in self._batches(layer, write=layer + 1):
            hidden = self._on_devices(self._hidden(layer)[rows])
            out[rows] = np.asarray(blocks.block(params, hidden, config, self.runtime))

    def _check_equal(self, layer: int, params: Params, changed: Params) -> None:
        """Raise unless a transformed block does on the first windows what it did before."""
        config = self.source.config.layer(layer)
        runtime = dataclasses.replace(self.runtime, compute_dtype="float32")
        rows, _ = next(self._batches(layer, write=layer + 1))
        hidden = self._on_devices(self._hidden(layer)[rows].astype(np.float32))
        before, after = (blocks.block(p, hidden, config, runtime) for p in (params, changed))
        off = float(jnp.max(jnp.abs(before - after)) / jnp.max(jnp.abs(before)))
        if not off <= EQUAL:
            raise ValueError(
                f"layer {layer}: the transformed block differs from the block by {off:.1e} of its "
                f"largest output (more than {EQUAL:g}) before anything is rounded"
            )

    def _hidden(self, layer: int) -> np.ndarray:
        assert self.tokens is not None
        shape = (*self.tokens.shape, self.source.config.d_model)
        return self.work.hidden("stream", layer, shape, jnp.dtype(self.runtime.compute_dtype))

    def _batches(self, layer: int, write: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of the micro-batches, and the hidden states before layer `write` to fill."""
        assert self.tokens is not None
        out, count = self._hidden(write), len(self.tokens)
        parts = self._parts()
        sizes = [n for n in range(parts, count + 1, parts) if count % n == 0]
        size = max([n for n in sizes if n <= self.options.micro_batch] or sizes[:1])
        for start in range(0, count, size):
            yield slice(start, start + size), out
            if self.known:
                return

    def _matrices(self) -> Iterator[dict[str, Array]]:
        for layer in range(self.source.config.num_layers):
            params = self.source.layer(layer)
            found = flatten(params)
            yield {p: found[p] for p in blocks.linear_paths(params) if self.options.wants(p)}

    def _parts(self) -> int:
        layout = self.runtime.layout
        return 1 if layout is None else layout.size("batch")

    def _on_devices(self, rows: np.ndarray) -> Array:
        layout = self.runtime.layout
        if layout is None:
            return jnp.asarray(rows)
        spec = PartitionSpec(*layout.spec(("batch",)), *(None,) * (rows.ndim - 1))
        return jax.device_put(rows, NamedSharding(layout.mesh, spec))

    def _place(self, layer: int, params: Params) -> Params:
        layout = self.runtime.layout
        if layout is None:
            return jax.tree.map(jnp.asarray, params)
        segment = next(s for s in self.source.config.segments if s.start <= layer < s.stop)
        places = _stacked_places(self.source.config, layout)[segment.name]
        return jax.tree.map(
            lambda leaf, place: jax.device_put(
                leaf, NamedSharding(layout.mesh, PartitionSpec(*place.spec[1:]))
            ),
            params,
            places,
        )

    def _by_columns(self, w: Array) -> Array:
        """A matrix split by columns over all devices, which the rounding of rows does not mix."""
        layout = self.runtime.layout
        if layout is None:
            return w
        every = layout.mesh.axis_names
        divides = w.shape[-1] % layout.mesh.size == 0
        spec = PartitionSpec(*(None,) * (w.ndim - 1), every if divides else None)
        return jax.device_put(w, NamedSharding(layout.mesh, spec))

    def _whole(self, stats: Stats) -> Stats:
        layout = self.runtime.layout
        if layout is None:
            return stats
        return jax.device_put(stats, NamedSharding(layout.mesh, PartitionSpec()))


def check_targets(source: Source, method: Method, options: Options) -> None:
    """Raise `ValueError` if no kernel is to be quantized, or one cannot be; nothing is read."""
    known: set[str] = set()
    for segment in source.config.segments:
        stack = flatten(abstract(source.config)["layers"][segment.name])
        for path in blocks.linear_paths(stack):
            known.add(path)
            if not options.wants(path):
                continue
            known_inputs = method.takes_experts and path.startswith(experts.FOLDER)
            if method.inputs != "none" and blocks.is_expert(path) and not known_inputs:
                raise ValueError(
                    f"layers/{segment.name}/{path} holds experts, for which "
                    f"{type(method).__name__} has no rule: leave them as they are with "
                    f"--keep='{KEEP}|experts/', or use a method without calibration"
                )
            rows, columns = stack[path].shape[-2:]
            method.at(path).check(f"layers/{segment.name}/{path}", (rows, columns))
    if not any(map(options.wants, known)):
        near = nearest(options.targets, known) or ", ".join(sorted(known))
        raise ValueError(
            f"targets={options.targets!r} with keep={options.keep!r} leaves nothing to quantize; "
            f"paths below a block, nearest: {near}"
        )


@dataclass(frozen=True)
class _Shared:
    """What a method prepared of a site's statistics, kept while matrices that read it follow."""

    method: Method | None
    stats: Stats | None
    prepared: Any

    def of(self, method: Method, stats: Stats | None) -> _Shared:
        if stats is self.stats and method == self.method:
            return self
        return _Shared(method, stats, _prepare(method, stats))


@functools.partial(jax.jit, static_argnums=0)
def _prepare(method: Method, stats: Stats | None) -> Any:
    return None if stats is None else method.prepare(stats)


@functools.partial(jax.jit, static_argnums=0)
def _linear(method: Method, w: Array, prepared: Any) -> tuple[Any, dict[str, Array]]:
    return method.linear(w, prepared)


@functools.partial(jax.jit, static_argnums=0)
def _experts(method: Method, w: Array, stats: Stats | None) -> tuple[Any, dict[str, Array]]:
    """A method on each of a stack of experts', whose preparations would not all fit beside it."""
    return jax.lax.map(lambda one: method.linear(one[0], _prepare(method, one[1])), (w, stats))


@functools.cache
def _stacked_places(config: Any, layout: Any) -> Any:
    return partition(abstract(config), rules(config), layout)["layers"]
