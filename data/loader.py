"""From (config, step) to a batch: the whole state of loading is one integer, the next step.

A batch is a dict of arrays over the global batch, or over the rows a host owns: `tokens`,
`targets`, `segment_ids`, `positions` int32 [batch, length], `loss_mask` float32 [batch, length]
and `source_id` int32 [batch]. Segment 0 is padding, documents of a window are 1, 2, …; positions
restart in each. Which rows a host asks for, and how many workers make them, changes nothing in a
row. Grain runs the workers and the prefetching.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.order import Order, key, permute
from data.packing import Piece, Plan
from data.store import TokenStore

Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray | None
NO_END = 2**40


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """One source of a mixture: its name, tokens and windows."""

    name: str
    store: TokenStore
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row of a batch came from; a piece is `(file, row in file, token start, stop)`."""

    row: int
    source: str
    epoch: int
    window: int
    pieces: tuple[tuple[str, int, int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """A window that was drawn; `component` is -1 for a row of padding."""

    component: int
    epoch: int
    index: int
    pieces: list[Piece]


@dataclasses.dataclass(frozen=True, eq=False)
class _Loader(abc.ABC):
    """What training and validation share: making batches of the windows that `draw` names."""

    components: tuple[Component, ...]
    length: int
    batch_size: int
    seed: int = 0
    buckets: tuple[int, ...] = ()
    workers: int = 0
    prefetch: int = 4

    @abc.abstractmethod
    def draw(self, step: int, rows: np.ndarray) -> list[_Window]:
        """The windows of rows of a step."""

    def batch_at(self, step: int, rows: Rows = None) -> Batch:
        """The batch of a step, or its `rows` (a slice or an array of row numbers)."""
        numbers = self._row_numbers(rows)
        windows = self.draw(step, numbers)
        width = self.length
        if self.buckets:
            # The width follows from all rows of the step, so that every host pads alike.
            every = self.draw(step, self._row_numbers(None))
            longest = max(sum(piece[2] for piece in window.pieces) for window in every)
            width = next((b for b in sorted(self.buckets) if b >= longest), self.length)
        return _assemble(self.components, windows, width)

    def describe(self, step: int, rows: Rows = None) -> list[Origin]:
        """Files, rows and token ranges behind each row of a step's batch."""
        numbers = self._row_numbers(rows)
        origins = []
        for number, window in zip(numbers, self.draw(step, numbers), strict=True):
            if window.component < 0:
                origins.append(Origin(int(number), "padding", 0, -1, ()))
                continue
            component = self.components[window.component]
            pieces = tuple(
                (*component.store.row(document)[:2], start, start + length)
                for document, start, length, _ in window.pieces
            )
            origins.append(Origin(int(number), component.name, window.epoch, window.index, pieces))
        return origins

    def iterate(self, start_step: int = 0, rows: Rows = None, stop: int = NO_END) -> BatchIterator:
        """Batches from `start_step` on, made ahead by a thread or by `workers` processes."""
        return BatchIterator(self, start_step, self._row_numbers(rows), stop)

    def _row_numbers(self, rows: Rows) -> np.ndarray:
        return np.arange(self.batch_size) if rows is None else np.arange(self.batch_size)[rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Loader(_Loader):
    """Training batches: the order's draw, then the epoch's permutation of a component's windows."""

    order: Order = dataclasses.field(kw_only=True)
    shuffle: bool = True

    def draw(self, step: int, rows: np.ndarray) -> list[_Window]:
        """The windows of rows of a step."""
        components, indices = self.order.draws(step, rows)
        windows = np.array([c.plan.windows for c in self.components])[components]
        epochs, places = indices // windows, indices % windows
        if self.shuffle:
            keys = [self._key(int(c), int(e)) for c, e in zip(components, epochs, strict=True)]
            places = permute(places, windows, np.array(keys, np.uint64))
        drawn = zip(components.tolist(), epochs.tolist(), np.asarray(places).tolist(), strict=True)
        return [_Window(c, e, w, self.components[c].plan.window(w, e)) for c, e, w in drawn]

    def _key(self, component: int, epoch: int) -> int:
        return _window_key(self.seed, self.components[component].name, epoch)

    def batch_index(self, step: int) -> int:
        """The batch that a training step reads: the step plus the batches skipped before it."""
        return self.order.batch_index(step)

    def with_skips(self, skips: tuple[tuple[int, int], ...]) -> Loader:
        """The same loader that never uses the batches in these half-open ranges."""
        return dataclasses.replace(self, order=dataclasses.replace(self.order, skips=skips))


@dataclasses.dataclass(frozen=True, eq=False)
class ValidationLoader(_Loader):
    """Every validation token once, in a fixed random order: the first batches are a fair sample.

    The last batch is filled up with rows of padding, which no loss counts.
    """

    @functools.cached_property
    def _first(self) -> np.ndarray:
        return np.cumsum([0] + [component.plan.windows for component in self.components])

    def __len__(self) -> int:
        """Batches that hold all windows."""
        return -(-int(self._first[-1]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.iterate(stop=len(self)))

    def draw(self, step: int, rows: np.ndarray) -> list[_Window]:
        """The windows of rows of a batch; rows after the last window are padding."""
        total = int(self._first[-1])
        if not 0 <= step < len(self):
            raise IndexError(f"validation batch {step}: there are {len(self)}")
        drawn = []
        for place in (step * self.batch_size + rows).tolist():
            if place >= total:
                drawn.append(_Window(-1, 0, -1, []))
                continue
            window = int(permute(place, total, key("validation")))
            component = int(np.searchsorted(self._first, window, side="right")) - 1
            window -= int(self._first[component])
            pieces = self.components[component].plan.window(window)
            drawn.append(_Window(component, 0, window, pieces))
        return drawn


class BatchIterator:
    """Batches in step order, made ahead. `step` is the next step and all there is to save.

    `waited` is how long the last `next` waited for data, in seconds, `waited_total` the sum.
    """

    def __init__(self, loader: _Loader, start: int, rows: np.ndarray, stop: int) -> None:
        import grain
        from absl import flags

        if loader.workers and not flags.FLAGS.is_parsed():
            # Grain's workers read absl flags, which a notebook never parses.
            flags.FLAGS.mark_as_parsed()

        self.step, self._stop = start, stop
        self.waited = self.waited_total = 0.0
        batches = grain.MapDataset.source(_Batches(loader, rows, start, stop))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=loader.prefetch)
        dataset = batches.to_iter_dataset(options)
        if loader.workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=loader.workers,
                    per_worker_buffer_size=max(1, -(-loader.prefetch // loader.workers)),
                )
            )
        self._iterator: Any = iter(dataset)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._iterator)
        self.waited = time.perf_counter() - began
        self.waited_total += self.waited
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop the thread or the workers."""
        self._iterator.close()


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """Grain's random-access source: item i is the batch of step `start + i`."""

    loader: _Loader
    rows: np.ndarray
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: Any) -> Batch:
        return self.loader.batch_at(self.start + int(index), self.rows)


def _assemble(components: tuple[Component, ...], windows: list[_Window], length: int) -> Batch:
    shape = (len(windows), length)
    names = ("tokens", "targets", "segment_ids", "positions")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["loss_mask"] = np.zeros(shape, np.float32)
    batch["source_id"] = np.array([max(w.component, 0) for w in windows], np.int32)
    for row, window in enumerate(windows):
        begin = 0
        for segment, (document, start, size, targets) in enumerate(window.pieces, 1):
            store = components[window.component].store
            ids = store.tokens(document, start, max(size, targets + 1))
            end = begin + size
            batch["tokens"][row, begin:end] = ids[:size]
            batch["targets"][row, begin : begin + targets] = ids[1 : targets + 1]
            batch["loss_mask"][row, begin : begin + targets] = 1
            batch["segment_ids"][row, begin:end] = segment
            batch["positions"][row, begin:end] = np.arange(size)
            begin = end
    return batch


@functools.lru_cache(maxsize=1024)
def _window_key(seed: int, name: str, epoch: int) -> int:
    return key(seed, name, epoch)
