"""The work of the kernels under decode, paged, shared-prefix and quantized attention: tiles of
query rows attend to blocks of keys that stream from memory (`stream_tpu`).

The work is a list of items. An item is a tile of queries with the keys of one sequence; items of a
tile follow each other and share one softmax. While a block of keys is multiplied the next one is on
its way, across items too, so the memory never waits. What a block looks like in memory is the
matter of `Blocks`: plain, in pages, in pages of few bits.

    for item:                              one step of the grid
        for block of its keys:             two buffers in turn
            for kv head:                   the rows of its query heads stacked
                scores -> running maximum, sum, weighted values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array


class Items(NamedTuple):
    """The work, `int32[items]` each, in the order of their tiles.

    tile: of queries. sequence: whose keys. first: its first block of keys beside the sinks'.
    sink_blocks: blocks 0.. that are read for the sinks. blocks: how many in all, at least one.
    begin, end: tokens of the flat order that are the sequence's. shift: a token's position minus
    its number in that order. length: slots in use. opens, closes: 1 for a tile's first, last item.
    """

    tile: Array
    sequence: Array
    first: Array
    sink_blocks: Array
    blocks: Array
    begin: Array
    end: Array
    shift: Array
    length: Array
    opens: Array
    closes: Array


@dataclass(frozen=True)
class Masking:
    """How scores are made, and which a row may see.

    A tile's rows are `tokens` times `group` query heads of a kv head, padded to `rows`. ring: slots
    of a ring, or None. unified: its (low, high), or None. splits: parts that each tile's keys are
    dealt to, one output each.
    """

    tokens: int
    group: int
    rows: int
    scale: float
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    ring: int | None = None
    soft_cap: float | None = None
    unified: tuple[float, float] | None = None
    alibi: bool = False
    return_lse: bool = False
    splits: int = 1


class Blocks(Protocol):
    """Keys and values in memory as the kernel reads them; static, the arrays come as references."""

    @property
    def keys(self) -> int:
        """In a block."""
        ...

    @property
    def kv_heads(self) -> int:
        """Whose keys and values there are."""
        ...

    @property
    def value_dim(self) -> int:
        """Of a value."""
        ...

    def buffers(self) -> Sequence[tuple[tuple[int, ...], Any]]:
        """Shape and dtype of the on-chip copy of one block, array by array."""
        ...

    def visit(self, copy: Callable[[Any, Any], None], arrays: Any, buffers: Any, at: Place) -> None:
        """`copy(source, destination)` for each piece of a block."""
        ...

    def clean(self, buffers: Any, valid: Any) -> None:
        """Make what lies beyond the first `valid` keys finite; it is weighted by 0."""
        ...

    def scores(self, q: Array, buffers: Any, head: int) -> Array:
        """`[rows, head_dim]` -> float32 `[rows, keys]`, not scaled."""
        ...

    def values(self, weights: Array, buffers: Any, head: int) -> Array:
        """float32 `[rows, keys]` -> float32 `[rows, value_dim]`."""
        ...


class Place(NamedTuple):
    """Where a block is: scalars, and the page table (a reference, or None)."""

    table: Any
    layer: Any
    sequence: Any
    length: Any
    block: Any
