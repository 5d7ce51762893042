"""How documents fill windows: plans made from lengths alone, before training, and saved.

A span is `(document, start, length)`: tokens of one document that may be trained on. A plan says
which pieces of spans make window w, for any w, so a window is random access. `StreamPlan` joins
the spans in a shuffled order and cuts every `length` tokens; `BinPlan` keeps documents whole where
they fit (`best_fit`, `first_fit`) or takes one a window (`pad`), and splits longer ones. Every
token of every span is in exactly one window of an epoch.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.files import fingerprint, write_folder
from data.order import key, permute

BLOCK = 65_536
"""Pieces that are packed together; each block is packed on its own, so memory stays bounded."""

Piece = tuple[int, int, int, int]
"""`(document, start, length, targets)`: tokens [start, start + length) of a document, one segment.

`targets` is `length` where the span goes on after the piece, since the next token is then known,
and `length - 1` where the piece ends it.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """Parts of documents: int64 arrays `document`, `start`, `length`, all of one size."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    @property
    def tokens(self) -> int:
        """Tokens in all spans together."""
        return int(self.length.sum())

    def arrays(self) -> dict[str, np.ndarray]:
        """Its columns by name."""
        return {"document": self.document, "start": self.start, "length": self.length}

    def take(self, index: np.ndarray) -> Spans:
        """The spans at `index`, in that order."""
        return Spans(self.document[index], self.start[index], self.length[index])


@dataclasses.dataclass(frozen=True, eq=False)
class StreamPlan:
    """`concat_split`: spans joined end to end, cut every `length` tokens; the last window may be
    short.

    In epochs after the first the cuts are moved by `shift(epoch)` tokens, the stream taken as a
    circle: the windows of each epoch begin elsewhere, and still hold every token once. Without a
    seed no cut moves.
    """

    spans: Spans
    offsets: np.ndarray
    length: int
    seed: int | None = None
    folder: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved of it, by file name."""
        return self.spans.arrays() | {"offsets": self.offsets}

    def __reduce__(self) -> tuple:
        return _reduce(self)

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return -(-int(self.offsets[-1]) // self.length)

    def shift(self, epoch: int) -> int:
        """Tokens by which an epoch's cuts are moved, in [0, length)."""
        if self.seed is None or epoch == 0:
            return 0
        return key(self.seed, "shift", epoch) % min(self.length, int(self.offsets[-1]))

    def window(self, index: int, epoch: int = 0) -> list[Piece]:
        """The pieces of window `index`, in order."""
        total = int(self.offsets[-1])
        begin = index * self.length + self.shift(epoch)
        end = min((index + 1) * self.length, total) + self.shift(epoch)
        if begin >= total:
            return self._between(begin - total, end - total)
        return self._between(begin, min(end, total)) + self._between(0, end - total)

    def _between(self, begin: int, end: int) -> list[Piece]:
        pieces: list[Piece] = []
        if begin >= end:
            return pieces
        number = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        while begin < end:
            span_end = int(self.offsets[number + 1])
            stop = min(end, span_end)
            inside = int(self.spans.start[number]) + begin - int(self.offsets[number])
            targets = stop - begin - (stop == span_end)
            pieces.append((int(self.spans.document[number]), inside, stop - begin, targets))
            begin, number = stop, number + 1
        return pieces


@dataclasses.dataclass(frozen=True, eq=False)
class BinPlan:
    """Windows as lists of pieces: window w holds pieces [window_offsets[w], window_offsets[w +
    1]).
    """

    pieces: Spans
    targets: np.ndarray
    window_offsets: np.ndarray
    length: int
    seed: int | None = None
    folder: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved of it, by file name."""
        own = {"targets": self.targets, "window_offsets": self.window_offsets}
        return self.pieces.arrays() | own

    def __reduce__(self) -> tuple:
        return _reduce(self)

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return len(self.window_offsets) - 1

    def window(self, index: int, epoch: int = 0) -> list[Piece]:
        """The pieces of window `index`, in order; the same in every epoch."""
        chosen = slice(int(self.window_offsets[index]), int(self.window_offsets[index + 1]))
        columns = (self.pieces.document, self.pieces.start, self.pieces.length, self.targets)
        return list(zip(*(column[chosen].tolist() for column in columns), strict=True))


Plan = StreamPlan | BinPlan


def _reduce(plan: Plan) -> tuple:
    """Pickle a saved plan as the name of its folder, so that workers read it and not copy it."""
    if plan.folder:
        return load_plan, (plan.folder,)
    values = tuple(getattr(plan, field.name) for field in dataclasses.fields(plan))
    return type(plan), values


def make_plan(
    spans: Spans,
    packing: str,
    length: int,
    *,
    seed: int | None = 0,
    shift: bool = True,
    max_segments: int = 0,
) -> Plan:
    """The windows of `length` tokens that spans are packed into.

    Args:
        spans: what to pack; empty ones take no part.
        packing: concat_split, best_fit, first_fit or pad.
        length: tokens in a window.
        seed: of the order in which documents are taken; None takes them as they come.
        shift: for concat_split with a seed, move the cuts each epoch.
        max_segments: pieces in a window at most; 0 for any number.
    """
    if length < 1:
        raise ValueError(f"window length is {length}: it must be at least 1 token")
    spans = spans.take(np.flatnonzero(spans.length > 0))
    if seed is not None and len(spans):
        spans = spans.take(
            np.asarray(permute(np.arange(len(spans)), len(spans), key(seed, "pack")))
        )
    if packing == "concat_split":
        offsets = np.concatenate([[0], np.cumsum(spans.length)]).astype(np.int64)
        return StreamPlan(spans, offsets, length, seed if shift else None)
    pieces, targets = _split_long(spans, length)
    if packing == "pad":
        return BinPlan(pieces, targets, np.arange(len(pieces) + 1), length)
    fit = {"best_fit": best_fit, "first_fit": first_fit}[packing]
    order, counts = [np.zeros(0, np.int64)], []
    for begin in range(0, len(pieces), BLOCK):
        for window in fit(pieces.length[begin : begin + BLOCK].tolist(), length, max_segments):
            order.append(begin + np.array(window, np.int64))
            counts.append(len(window))
    window_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    taken = np.concatenate(order)
    return BinPlan(pieces.take(taken), targets[taken], window_offsets, length)


def _split_long(spans: Spans, length: int) -> tuple[Spans, np.ndarray]:
    """Pieces of at most `length` tokens, and the targets of each."""
    parts = -(-spans.length // length)
    owner = np.repeat(np.arange(len(spans)), parts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    left = spans.length[owner] - part * length
    sizes = np.minimum(left, length)
    pieces = Spans(spans.document[owner], spans.start[owner] + part * length, sizes)
    return pieces, sizes - (left <= length)


def best_fit(lengths: list[int], capacity: int, max_segments: int = 0) -> list[list[int]]:
    """Each item into the open bin with the least space that still holds it: lists of item numbers.

    Bins stand in stacks by free space, and one integer has a bit for each stack that is not empty,
    so the bin is found by isolating a bit: O(1) an item.
    """
    bins: list[list[int]] = []
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    for item, need in enumerate(lengths):
        above = occupied >> need
        if above:
            space = need + (above & -above).bit_length() - 1
            chosen = stacks[space].pop()
            if not stacks[space]:
                occupied &= ~(1 << space)
            bins[chosen].append(item)
        else:
            space, chosen = capacity, len(bins)
            bins.append([item])
        space -= need
        if space and len(bins[chosen]) != max_segments:
            stacks[space].append(chosen)
            occupied |= 1 << space
    return bins


def first_fit(lengths: list[int], capacity: int, max_segments: int = 0) -> list[list[int]]:
    """Each item into the earliest bin that holds it, found in a tree of maxima: O(log bins) an
    item.
    """
    size = 1 << max(1, len(lengths)).bit_length()
    tree = [capacity] * (2 * size)
    bins: list[list[int]] = []
    for item, need in enumerate(lengths):
        node = 1
        while node < size:
            node = 2 * node if tree[2 * node] >= need else 2 * node + 1
        chosen = node - size
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        tree[node] -= need
        if len(bins[chosen]) == max_segments:
            tree[node] = -1
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return bins


def cached_plan(cache: Path, parts: object, make: Callable[[], Plan]) -> Plan:
    """The plan saved under the fingerprint of `parts`, made and saved first if it is not there."""
    folder = cache / fingerprint(parts)[:20]
    if not folder.exists():
        plan = make()
        files = {f"{name}.npy": _npy(array) for name, array in plan.arrays().items()}
        header = {"kind": type(plan).__name__, "length": plan.length, "seed": plan.seed}
        write_folder(folder, files | {"plan.json": json.dumps(header).encode()})
    return load_plan(folder)


def load_plan(folder: str | os.PathLike) -> Plan:
    """A plan that `cached_plan` saved; its arrays stay on disk."""
    folder = Path(folder)
    header = json.loads((folder / "plan.json").read_text())
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    spans = Spans(arrays["document"], arrays["start"], arrays["length"])
    if header["kind"] == "StreamPlan":
        return StreamPlan(
            spans, arrays["offsets"], header["length"], header["seed"], folder=str(folder)
        )
    return BinPlan(
        spans,
        arrays["targets"],
        arrays["window_offsets"],
        header["length"],
        header["seed"],
        folder=str(folder),
    )


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
