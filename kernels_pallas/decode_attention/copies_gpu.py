"""The copying warpgroup of the kernel of `stream_gpu`, and what its warpgroups share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_attention.stream import Items, Masking, Place

KEYS = 64
"""Of a block."""


class Source(Protocol):
    """Keys and values in memory, of which a block is `KEYS` tokens."""

    @property
    def copies(self) -> int:
        """That make up the keys of a block; the values take as many."""
        ...

    def start(
        self, copy: Callable[[Any, Any], None], array: Any, which: int, slot: Any, head: Any,
        at: Place,
    ) -> None:  # fmt: skip
        """`copy(source, destination)` for each piece of the keys (0) or values (1) of a block."""
        ...


@dataclass(frozen=True)
class Call:
    """Static. pieces: of 64 rows that a tile has. turns: warpgroups that take the blocks of a piece
    in turn. slots: blocks in flight. simulate: run on a CPU.
    """

    masking: Masking
    source: Source
    pieces: int
    turns: int
    slots: int
    simulate: bool

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return self.pieces * self.turns


class References(NamedTuple):
    """What the kernel is given: scalars, arrays, results, and memory to work in."""

    items: Any
    first: Any
    layer: Any
    table: Any
    tokens: Any
    q: Any
    slopes: Any
    phi: Any
    arrays: Any
    out: Any
    lse: Any
    q_own: Any
    keys: Any
    values: Any
    lse_own: Any
    other: Any
    q_there: Any
    keys_there: Any
    values_there: Any
    free: Any
    other_there: Any


def named(call: Call, arrays: int, refs: Sequence[Any]) -> References:
    """References by name; those that the call does without are None."""
    masking, left = call.masking, list(refs)
    optional = {"slopes": masking.alibi, "phi": masking.unified is not None}
    optional |= {"other": 3 * (call.turns > 1), "other_there": call.turns > 1}
    found: dict[str, Any] = {}
    for name in References._fields:
        count = arrays if name == "arrays" else int(optional.get(name, 1))
        taken, left = left[:count], left[count:]
        several = name in ("arrays", "other")
        found[name] = taken if several else taken[0] if taken else None
    return References(**found)


def field(r: References, name: str, item: Any) -> Any:
    """A scalar of an item."""
    return r.items[Items._fields.index(name), item]


def place(r: References, item: Any, turn: Any) -> Place:
    """Where the block of a turn is: those of the sinks come first."""
    sinks, first = field(r, "sink_blocks", item), field(r, "first", item)
    block = jnp.where(turn < sinks, turn, first + turn - sinks)
    return Place(r.table, r.layer[0], field(r, "sequence", item), field(r, "length", item), block)


def start(call: Call, r: References, head: Any, at: Place, slot: Any) -> None:
    """Copy the block at a place into a slot."""
    for which, ring, there in ((0, r.keys, r.keys_there), (1, r.values, r.values_there)):

        def copy(source: Any, destination: Any, there: Any = there) -> None:
            plgpu.copy_gmem_to_smem(source, destination, there.at[slot])

        array = r.arrays[min(which, len(r.arrays) - 1)]
        call.source.start(copy, array, which, ring.at[slot], head, at)


def fill(call: Call, r: References, head: Any, first: Any, stop: Any) -> None:
    """The blocks of all items, each as soon as its slot is free again."""

    def item(index: Any, step: Any) -> Any:
        def block(turn: Any, step: Any) -> Any:
            slot = jax.lax.rem(step, jnp.int32(call.slots))
            pl.when(step >= call.slots)(lambda: plgpu.barrier_wait(r.free.at[slot]))
            start(call, r, head, place(r, index, turn), slot)
            return step + 1

        return jax.lax.fori_loop(0, field(r, "blocks", index), block, step)

    steps = jax.lax.fori_loop(first, stop, item, jnp.int32(0))

    def drain(step: Any, _: Any) -> Any:
        plgpu.barrier_wait(r.free.at[jax.lax.rem(step, jnp.int32(call.slots))])
        return _

    jax.lax.fori_loop(jnp.maximum(steps - call.slots, 0), steps, drain, jnp.int32(0))
