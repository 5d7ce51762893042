"""Pipeline schedules as data: which stage works on which micro-batch in which tick.

A tick is one forward or one backward pass of one chunk of layers. All stages run one program, so in
a tick all go the same way, and what a stage sends stands at its neighbour in the next. With p
stages, m micro-batches and v chunks a stage, an order of passes is all that tells schedules apart:

    GPipe (Huang et al. 2019)         F x (m + p - 1)     B x (m + p - 1)
    interleaved (Narayanan et al. 2021, section 2.2)
                                      F x (m v + p - 1)   B x (m v + p - 1)
    1F1B (Harlap et al. 2018)         F x (p - 1)   F B x m   B x (p - 1)

Nothing here knows of JAX: `sharding.pipeline` runs what stands here, and `planning` counts it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from weights import nearest


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How micro-batches go through the stages of `mesh.stage`; there are `train.accumulation`.

    schedule: "gpipe", "interleaved" (less idle time), or "1f1b" (memory for few micro-batches).
    repeats: chunks of layers on each stage, for "interleaved".
    layers: of each stage, (26, 22), where stages are not equally fast; empty are equal parts.
    outside: embedding, head and loss are "shared" by the stages, a part of the length each, or
        "repeated" by every stage, so that over slow links only messages pass from stage to stage.
    """

    schedule: str = "gpipe"
    repeats: int = 1
    layers: tuple[int, ...] = ()
    outside: str = "shared"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            known = nearest(self.schedule, SCHEDULES) or ", ".join(SCHEDULES)
            raise ValueError(f"pipeline.schedule={self.schedule!r}: no such one; nearest: {known}")
        if self.repeats < 1:
            raise ValueError(f"pipeline.repeats={self.repeats} must be at least 1")
        if self.repeats > 1 and self.schedule != "interleaved":
            raise ValueError(
                f"pipeline.repeats={self.repeats} needs pipeline.schedule='interleaved', "
                f"not {self.schedule!r}"
            )
        if self.outside not in ("shared", "repeated"):
            near = nearest(self.outside, ("shared", "repeated")) or "shared, repeated"
            raise ValueError(f"pipeline.outside={self.outside!r}: no such one; nearest: {near}")
        if self.layers and min(self.layers) < 1:
            raise ValueError(f"pipeline.layers={self.layers}: each stage needs at least one layer")
        if self.layers and self.repeats > 1:
            raise ValueError(
                f"pipeline.layers={self.layers} needs one chunk a stage, not "
                f"pipeline.repeats={self.repeats}"
            )


@dataclasses.dataclass(frozen=True)
class Work:
    """One pass: chunk `chunk` of the layers, which is on stage `stage`, on a micro-batch."""

    tick: int
    stage: int
    micro_batch: int
    chunk: int
    backward: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An order of passes.

    stages: p. micro_batches: m. repeats: v, chunks a stage; chunk c is on stage c mod p.
    passes: "F" or "B" for each tick.
    first_first: whether the micro-batch that came first also goes back first, or last.
    """

    stages: int
    micro_batches: int
    repeats: int
    passes: str
    first_first: bool = False

    @property
    def items(self) -> int:
        """Passes of one direction that a stage makes: `m v`."""
        return self.micro_batches * self.repeats

    @property
    def forward_ticks(self) -> int:
        """Ticks from the first forward pass to the last: `m v + p - 1`."""
        return self.items + self.stages - 1

    def item(self, number: Any) -> tuple[Any, Any]:
        """`(micro-batch, repeat)` of a stage's item; whole numbers or arrays of them.

        Groups of p micro-batches make all their repeats before the next group begins, so that what
        leaves the last stage is what the first needs in the next tick, and nothing waits.
        """
        if self.repeats == 1:
            return number, 0 * number
        group, within = divmod(number, self.stages * self.repeats)
        repeat, member = divmod(within, self.stages)
        return group * self.stages + member, repeat

    def work(self) -> Iterator[Work]:
        """All passes, tick by tick."""
        done = {"F": 0, "B": 0}
        for tick, direction in enumerate(self.passes):
            for stage in range(self.stages):
                number = self._number(direction, done[direction], stage)
                if 0 <= number < self.items:
                    micro_batch, repeat = self.item(number)
                    chunk = repeat * self.stages + stage
                    yield Work(tick, stage, micro_batch, chunk, direction == "B")
            done[direction] += 1

    def _number(self, direction: str, count: int, stage: int) -> int:
        """Which of its items a stage has in its `count`-th tick of a direction."""
        if direction == "F":
            return count - stage
        if self.first_first:
            return count - (self.stages - 1 - stage)
        return self.forward_ticks - 1 - count - stage

    def leaving(self) -> list[int]:
        """The tick in which each micro-batch makes its last forward pass."""
        ticks = [0] * self.micro_batches
        for work in self.work():
            if not work.backward and work.chunk == self.stages * self.repeats - 1:
                ticks[work.micro_batch] = work.tick
        return ticks

    @property
    def bubble(self) -> float:
        """Share of all ticks of all stages in which nothing is done, counted."""
        return 1 - sum(1 for _ in self.work()) / (len(self.passes) * self.stages)

    def kept(self) -> list[int]:
        """Most items of each stage that have gone forward and not yet back, counted: inputs that
        must be kept. Each is of one chunk, so of `layers / (p v)` layers.
        """
        now, most = [0] * self.stages, [0] * self.stages
        for work in self.work():
            now[work.stage] += -1 if work.backward else 1
            most[work.stage] = max(most[work.stage], now[work.stage])
        return most


def bubble_formula(stages: int, micro_batches: int, repeats: int = 1) -> float:
    """`(p - 1) / (m v + p - 1)`: the share of a step that a stage is idle (Narayanan et al. 2021,
    section 2.2, where it is given over the ideal time: `(p - 1) / (m v)`).
    """
    return (stages - 1) / (micro_batches * repeats + stages - 1)


def gpipe(stages: int, micro_batches: int, repeats: int = 1) -> Schedule:
    """All forward, then all backward, the last first; the gradient of the forward loop itself."""
    ticks = micro_batches * repeats + stages - 1
    return Schedule(stages, micro_batches, repeats, "F" * ticks + "B" * ticks)


def interleaved(stages: int, micro_batches: int, repeats: int = 2) -> Schedule:
    """`gpipe` with v chunks of layers a stage: v times the sends, a v-th of the idle time.

    Raises `ValueError` if micro-batches do not come in groups of p, which the ring needs.
    """
    if micro_batches % stages:
        below, above = micro_batches // stages * stages, -(-micro_batches // stages) * stages
        near = " or ".join(str(count) for count in (below, above) if count)
        raise ValueError(
            f"{micro_batches} micro-batches (train.accumulation) do not make groups of "
            f"mesh.stage={stages}, as pipeline.schedule='interleaved' needs; use {near}"
        )
    return gpipe(stages, micro_batches, repeats)


def one_forward_one_backward(stages: int, micro_batches: int, repeats: int = 1) -> Schedule:
    """A micro-batch goes back as soon as it has reached the last stage, so that what is kept does
    not grow with m: `min(m, 2 (p - 1 - i) + 1)` inputs on stage i.

    Stages that go forward while others go back keep `p - i`; one program for all cannot do that
    without computing both and throwing one away.
    """
    passes = "F" * (stages - 1) + "FB" * micro_batches + "B" * (stages - 1)
    return Schedule(stages, micro_batches, repeats, passes, first_first=True)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "interleaved": interleaved,
    "1f1b": one_forward_one_backward,
}
"""Name -> `(stages, micro-batches, repeats) -> Schedule`."""


def pipeline_schedule(config: PipelineConfig, stages: int, micro_batches: int) -> Schedule:
    """The schedule of a config. Raises `ValueError` that names the field if sizes do not fit."""
    return SCHEDULES[config.schedule](stages, micro_batches, config.repeats)


def check_layers(layers: int, stages: int, repeats: int = 1) -> int:
    """Layers of one chunk. Raises `ValueError` with the stages that would work if they do not
    divide.
    """
    if layers % (stages * repeats):
        fits = [n for n in range(1, layers + 1) if layers % (n * repeats) == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - stages))[:3])
        chunks = f" x {repeats} repeats" if repeats > 1 else ""
        would = f"mesh.stage={' or '.join(map(str, near))}" if near else "fewer pipeline.repeats"
        raise ValueError(
            f"{layers} layers do not divide over mesh.stage={stages}{chunks}; use {would}"
        )
    return layers // (stages * repeats)


@dataclasses.dataclass(frozen=True)
class Route:
    """Chunk number `slot` of those that lie on a stage goes to another, there to be `to_slot`."""

    stage: int
    slot: int
    to_stage: int
    to_slot: int


def chunk_routes(stages: int, repeats: int) -> list[list[Route]]:
    """The way from layers in order (v chunks on each of p stages) to interleaved ones, where chunk
    c is number `c // p` on stage `c mod p`: v rounds, in each of which every stage sends one chunk
    and receives one.

    Stage s sends its chunk `(round + s // (p / gcd(p, v))) mod v`. Stages that begin at the same
    chunk modulo p so send different ones modulo the gcd, and all others differ already.
    """
    apart = stages // math.gcd(stages, repeats)
    rounds = []
    for number in range(repeats):
        slots = [(number + stage // apart) % repeats for stage in range(stages)]
        chunks = [stage * repeats + slot for stage, slot in enumerate(slots)]
        rounds.append(
            [
                Route(stage, slot, chunk % stages, chunk // stages)
                for stage, (slot, chunk) in enumerate(zip(slots, chunks, strict=True))
            ]
        )
    return rounds
