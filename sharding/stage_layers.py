"""Pipeline stages of unequal numbers of layers, for stages that are not equally fast.

Layers stay stored as they are for any mesh, in equal parts over `stage`, so a checkpoint knows
nothing of this. A step begins by sending to each stage the layers that it runs and another stores;
the gradient goes the same way back. All stages run one program (`sharding.pipeline`), whose loop
turns as often as the longest stage has layers; in turns that a stage has too many it does nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sharding.layout import Layout

Array = jax.Array
STAGE = "stage"


def check_stage_layers(layers: Sequence[int], total: int, stages: int) -> None:
    """Raise `ValueError` that names `pipeline.layers` if they do not fit model and mesh."""
    where = f"pipeline.layers={tuple(layers)}"
    if len(layers) != stages:
        raise ValueError(f"{where}: {len(layers)} stages, mesh.stage is {stages}")
    if sum(layers) != total:
        raise ValueError(f"{where}: {sum(layers)} layers in all, the model has {total}")


@dataclasses.dataclass(frozen=True)
class Move:
    """Layers that go from where they are stored to the stage `by` further on, at most `most` each.

    Of each stage that receives: from which layer of the sender's part on (`starts`, of each that
    sends), into which of its slots (`slots`), how many (`counts`).
    """

    by: int
    most: int
    starts: tuple[int, ...]
    slots: tuple[int, ...]
    counts: tuple[int, ...]


def moves(layers: Sequence[int]) -> list[Move]:
    """How layers stored in equal parts get to stages that run `layers[0]`, `layers[1]`, … of them;
    those that stay (`by=0`) included.
    """
    stages, part = len(layers), sum(layers) // len(layers)
    first = [0, *itertools.accumulate(layers)]
    found = []
    for by in range(1 - stages, stages):
        starts, slots, counts = [0] * stages, [0] * stages, [0] * stages
        for stage in range(max(by, 0), min(stages, stages + by)):
            sender = stage - by
            begin = max(first[stage], sender * part)
            count = min(first[stage + 1], (sender + 1) * part) - begin
            if count > 0:
                starts[sender] = begin - sender * part
                slots[stage], counts[stage] = begin - first[stage], count
        if any(counts):
            found.append(Move(by, max(counts), tuple(starts), tuple(slots), tuple(counts)))
    return found


def padded_stages(stack: Any, layers: Sequence[int], layout: Layout) -> Any:
    """`[layers, …] -> [1, p, most layers of a stage, …]` of every array, the second axis over
    `stage`; slots that a stage does not need hold zeros.
    """
    if not jax.tree.leaves(stack):
        return stack
    return jax.shard_map(
        functools.partial(jax.tree.map, functools.partial(_received, tuple(layers))),
        mesh=layout.mesh,
        in_specs=PartitionSpec(STAGE),
        out_specs=PartitionSpec(None, STAGE),
        axis_names={STAGE},
        check_vma=False,
    )(stack)


def _received(layers: tuple[int, ...], mine: Array) -> Array:
    """One stage's stored layers `[part, …]` -> those that it runs `[1, 1, most, …]`."""
    stages, most, here = len(layers), max(layers), jax.lax.axis_index(STAGE)
    made = jnp.zeros((most, *mine.shape[1:]), mine.dtype)
    for move in moves(layers):
        start, slot, count = (
            jnp.asarray(values)[here] for values in (move.starts, move.slots, move.counts)
        )
        rows = start + jnp.arange(move.most)
        got = jnp.take(mine, rows, axis=0, mode="clip")
        if move.by:
            pairs = [(s - move.by, s) for s in range(stages) if move.counts[s]]
            got = jax.lax.ppermute(got, STAGE, pairs)
        place = jnp.arange(most) - slot
        real = ((place >= 0) & (place < count)).reshape(-1, *(1,) * (mine.ndim - 1))
        made = jnp.where(real, jnp.take(got, place, axis=0, mode="clip"), made)
    return made[None, None]
