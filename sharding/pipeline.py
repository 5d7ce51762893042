"""Running a pipeline schedule: stages side by side along the mesh axis `stage`.

All stages run one program. What is at work lies along a leading axis split over `stage`, the
stage's function is mapped over it, and between ticks it moves on by one device (GSPMD, Xu et al.
2021, section 3.3). So a stage's function knows of no pipeline, and whatever it does on the other
axes of the mesh (fsdp, tensor, context, expert) it goes on doing.

A message is what travels from stage to stage: any tree of arrays. In ticks in which a stage has
nothing to do it works on what is there, and nobody reads the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sharding.layout import ROLES, Layout
from sharding.pipeline_schedules import Schedule, chunk_routes
from sharding.stage_layers import STAGE, padded_stages

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What a pipeline runs, and where.

    stage: `(chunk, fixed chunk, message, micro-batch, number of the chunk) -> message` of the same
        shapes; the gradient is taken of what is in `chunk`.
    schedule: which stage works on what in which tick.
    layout: the mesh, with an axis `stage` of as many devices as the schedule has stages.
    repeated: whether every stage makes what enters the first and leaves the last itself; messages
        that enter or leave then have an axis `[p]`, of which the others' are not read.
    branches: whether stages branch, so that one may do less than another: then devices are told
        apart (`jax.shard_map`), and only exchanges inside a stage may stand in a branch.
    """

    stage: Callable[[Any, Any, Any, Any, Array], Any]
    schedule: Schedule
    layout: Layout
    repeated: bool = False
    branches: bool = False

    def __post_init__(self) -> None:
        devices = self.layout.mesh.shape.get(STAGE, 1)
        if devices != self.schedule.stages:
            raise ValueError(
                f"the schedule has {self.schedule.stages} stages, mesh.stage is {devices}"
            )

    def entering(self, message: Any) -> Any:
        """What enters the first stage, with an axis over stages."""
        return message if self.repeated else _broadcast(message)

    def by_stage(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` on the part of each stage, of arguments with a leading axis `[p]`."""
        if not self.branches:
            return jax.vmap(run, spmd_axis_name=STAGE)

        def own(*parts: Any) -> Any:
            made = run(*jax.tree.map(lambda x: x[0], parts))
            return jax.tree.map(lambda x: x[None], made)

        return jax.shard_map(
            own,
            mesh=self.layout.mesh,
            in_specs=PartitionSpec(STAGE),
            out_specs=PartitionSpec(STAGE),
            axis_names={STAGE},
            check_vma=False,
        )

    def at(self, held: Any, stage: int) -> Any:
        """Of what stages hold that of one, or all where outside parts are repeated."""
        return held if self.repeated else _at(held, stage)


def outside_stages(layout: Layout) -> Layout:
    """The layout of what runs outside the stages (embedding, head, loss): they share the length of
    a sequence, so that none of them repeats another's work.
    """

    def split(table: Any) -> Any:
        return tuple((k, (*axes, STAGE) if k == "length" else axes) for k, axes in table)

    return dataclasses.replace(layout, **{role: split(getattr(layout, role)) for role in ROLES})


def chunks_of(stack: Any, schedule: Schedule, layout: Layout, layers: tuple[int, ...] = ()) -> Any:
    """`[layers, …] -> [v, p, layers / (p v), …]` of every array, the second axis over stages.

    With one chunk a stage nothing moves. With v, each stage passes v chunks on, one at a time
    (`chunk_routes`). `layers` of each stage, where they are unequal (`padded_stages`).
    """
    if layers:
        return padded_stages(stack, layers, layout)
    if schedule.repeats == 1:
        cut = jax.tree.map(lambda x: x.reshape(1, schedule.stages, -1, *x.shape[1:]), stack)
        return _over_stages(cut, layout, axis=1)
    if not jax.tree.leaves(stack):
        return stack
    return jax.shard_map(
        functools.partial(jax.tree.map, functools.partial(_interleaved, schedule)),
        mesh=layout.mesh,
        in_specs=PartitionSpec(STAGE),
        out_specs=PartitionSpec(None, STAGE),
        axis_names={STAGE},
        check_vma=False,
    )(stack)


def _interleaved(schedule: Schedule, x: Array) -> Array:
    """One stage's layers in order `[v k, …]` -> those that it runs `[v, 1, k, …]`."""
    mine = x.reshape(schedule.repeats, -1, *x.shape[1:])
    made, here = jnp.zeros_like(mine), jax.lax.axis_index(STAGE)
    for routes in chunk_routes(schedule.stages, schedule.repeats):
        slots = jnp.asarray([route.slot for route in routes])
        pairs = [(route.stage, route.to_stage) for route in routes]
        got = jax.lax.ppermute(mine[slots[here]], STAGE, pairs)
        arrived = sorted(routes, key=lambda route: route.to_stage)
        to_slots = jnp.asarray([route.to_slot for route in arrived])
        made = made.at[to_slots[here]].set(got)
    return made[:, None]


def circulate(
    pipeline: Pipeline,
    chunks: Any,
    fixed: Any,
    micro: Any,
    messages: Any,
    leaving: Callable[[Any], Any] = lambda message: message,
) -> Any:
    """Messages `[m, …]` through all chunks of layers: GPipe, or interleaved with several repeats.

    One loop over `m v + p - 1` ticks. JAX's own gradient of it is the backward half of the
    schedule, and keeps of each tick what the stage's function would keep.

    Args:
        pipeline: what runs.
        chunks: arrays `[v, p, layers of a chunk, …]` that train (`chunks_of`); fixed: those that do
            not.
        micro: what stages read of each micro-batch, arrays `[m, …]`.
        messages: what enters the first stage, arrays `[m, …]`; `[m, p, …]` of a `repeated` one.
        leaving: places what leaves the last stage, `[…]` or `[p, …]`.
    """
    schedule, layout = pipeline.schedule, pipeline.layout
    assert not schedule.first_first, "1F1B is run by `alternate`"
    stages = jnp.arange(schedule.stages)
    work = pipeline.by_stage(pipeline.stage)

    def tick(held: Any, count: Array) -> tuple[Any, Any]:
        number = jnp.clip(count - stages, 0, schedule.items - 1)
        index, repeat = schedule.item(number)
        entering = jax.tree.map(lambda x: x[index[0]], messages)
        held = _where((stages == 0) & (repeat == 0), pipeline.entering(entering), held)
        held = _over_stages(held, layout)
        ours, others = jax.tree.map(lambda x: _chunk(x, repeat), (chunks, fixed))
        of_micro = jax.tree.map(lambda x: x[index], micro)
        number = repeat * schedule.stages + stages
        held = work(ours, others, held, of_micro, number)
        held = _over_stages(held, layout)
        left = leaving(pipeline.at(held, schedule.stages - 1))
        return _over_stages(_shift(held, 1, schedule.repeats > 1), layout), left

    first = jax.lax.stop_gradient(jax.tree.map(lambda x: x[0], messages))
    start = _over_stages(_repeated(pipeline.entering(first), schedule.stages), layout)
    _, left = jax.lax.scan(tick, start, jnp.arange(schedule.forward_ticks))
    ticks = np.asarray(schedule.leaving())
    return jax.tree.map(lambda x: x[ticks], left)


def alternate(
    pipeline: Pipeline,
    chunks: Any,
    fixed: Any,
    rest: Any,
    micro: Any,
    enter: Callable[[Any, Any], Any],
    leave: Callable[[Any, Any, Any], tuple[Array, Any]],
) -> tuple[Any, Any, Any]:
    """Loss and gradients with one forward and one backward pass by turns: 1F1B.

    Three loops: `p - 1` ticks forward, m of a forward pass, the loss and a backward pass, `p - 1`
    backward. Of a stage's passes only the inputs are kept, `min(m + p - 1, 2 p - 1)` of them, and
    the backward pass computes the stage anew. Not to be differentiated itself.

    Args:
        pipeline: what runs; one chunk a stage.
        chunks, fixed, micro: as in `circulate`.
        rest: trained arrays outside the stages.
        enter: `(rest, one micro-batch) -> message`.
        leave: `(rest, message, one micro-batch) -> (scalar, metrics)`. Of a `repeated` pipeline,
            messages and what the gradient of `rest` is taken of have an axis `[p]`.

    Returns:
        float32 gradients of the sum of the scalars, of `chunks` and of `rest`, and the metrics
        `[m, …]`.
    """
    p, m = pipeline.schedule.stages, pipeline.schedule.micro_batches
    ours, others = (jax.tree.map(lambda x: x[0], tree) for tree in (chunks, fixed))
    passes = _Passes(pipeline, ours, others, rest, micro, enter)

    def warm(carry: Any, count: Array) -> tuple[Any, None]:
        return passes.forward(carry[0], carry[1], count)[:2], None

    def steady(carry: Any, count: Array) -> tuple[Any, Any]:
        held, kept, back, sums = carry
        held, kept, message = passes.forward(held, kept, count + p - 1)
        _, pull, metrics = jax.vjp(
            lambda rest, message: leave(rest, message, passes.of(count)),
            rest,
            message,
            has_aux=True,
        )
        of_rest, last = pull(jnp.float32(1))
        sums = (sums[0], _add(sums[1], of_rest))
        back, sums = passes.backward(back, kept, sums, count, last)
        return (held, kept, back, sums), metrics

    held, kept = passes.start()
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (ours, rest))
    (held, kept), _ = jax.lax.scan(warm, (held, kept), jnp.arange(p - 1))
    back = jax.tree.map(jnp.zeros_like, held)
    (_, kept, back, sums), metrics = jax.lax.scan(steady, (held, kept, back, sums), jnp.arange(m))
    nothing = jax.tree.map(jnp.zeros_like, pipeline.at(back, 0))

    def cool(carry: Any, count: Array) -> tuple[Any, None]:
        return passes.backward(carry[0], kept, carry[1], count, nothing), None

    (_, (of_chunks, of_rest)), _ = jax.lax.scan(cool, (back, sums), m + jnp.arange(p - 1))
    return jax.tree.map(lambda x: x[None], of_chunks), of_rest, metrics


@dataclasses.dataclass(frozen=True)
class _Passes:
    """One tick forward and one tick backward of `alternate`, all stages at once.

    Each tick forward leaves its inputs in the next of a ring of slots, the same for all stages.
    """

    pipeline: Pipeline
    ours: Any
    others: Any
    rest: Any
    micro: Any
    enter: Callable[[Any, Any], Any]

    @property
    def slots(self) -> int:
        """Ticks between a micro-batch's passes on the first stage, or fewer if there are not."""
        schedule = self.pipeline.schedule
        return min(schedule.forward_ticks, 2 * schedule.stages - 1)

    @property
    def stages(self) -> Array:
        """The number of each stage."""
        return jnp.arange(self.pipeline.schedule.stages)

    def of(self, index: Array) -> Any:
        """What is read of a micro-batch, or of one a stage."""
        return jax.tree.map(lambda x: x[index], self.micro)

    def place(self, tree: Any) -> Any:
        """Split over the stages."""
        return _over_stages(tree, self.pipeline.layout)

    def start(self) -> tuple[Any, Any]:
        """What stages hold before the first tick, and slots in which nothing is kept."""
        schedule = self.pipeline.schedule
        first = self.enter(self.rest, self.of(jnp.int32(0)))
        held = self.place(_repeated(self.pipeline.entering(first), schedule.stages))
        lead = (schedule.stages, self.slots)
        kept = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape[1:]), x.dtype), held)
        return held, self.place(kept)

    def forward(self, held: Any, kept: Any, count: Array) -> tuple[Any, Any, Any]:
        """`(what stages hold next, kept inputs, the message that leaves the last stage)`."""
        last, stages = self.pipeline.schedule.stages - 1, self.stages
        index = jnp.clip(count - stages, 0, self.pipeline.schedule.micro_batches - 1)
        entering = self.enter(self.rest, self.of(index[0]))
        held = self.place(_where(stages == 0, self.pipeline.entering(entering), held))

        def keep(slots: Array, one: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(slots, one, count % self.slots, 1)

        kept = jax.tree.map(keep, kept, held)
        work = self.pipeline.by_stage(self.pipeline.stage)
        made = self.place(work(self.ours, self.others, held, self.of(index), stages))
        return self.place(_shift(made, 1)), kept, self.pipeline.at(made, last)

    def backward(
        self, back: Any, kept: Any, sums: Any, count: Array, leaving: Any
    ) -> tuple[Any, Any]:
        """`(cotangents that stages hold next, sums of gradients)`; `leaving` is the cotangent of
        what left the last stage.
        """
        schedule, stages = self.pipeline.schedule, self.stages
        number = count - (schedule.stages - 1 - stages)
        index = jnp.clip(number, 0, schedule.micro_batches - 1)
        back = _where(stages == schedule.stages - 1, self.pipeline.entering(leaving), back)
        real = (number >= 0) & (number < schedule.micro_batches)
        back = _where(real, back, jax.tree.map(jnp.zeros_like, back))
        slot = (index + stages) % self.slots  # item n of stage s went forward in tick n + s
        inputs = self.place(jax.tree.map(lambda x: _slot(x, slot), kept))
        pull = self.pipeline.by_stage(self._pull)
        of_chunks, back = pull(self.ours, self.others, inputs, back, self.of(index), stages)
        back = self.place(back)
        _, pull = jax.vjp(lambda rest: self.enter(rest, self.of(index[0])), self.rest)
        first = _where(stages == 0, back, jax.tree.map(jnp.zeros_like, back))
        (of_rest,) = pull(self.pipeline.at(first, 0))
        return self.place(_shift(back, -1)), _add(sums, (of_chunks, of_rest))

    def _pull(self, ours: Any, others: Any, message: Any, back: Any, of: Any, stage: Array) -> Any:
        """Cotangents of one stage's chunk and of its message; its pass is computed anew."""

        def run(ours: Any, message: Any) -> Any:
            return self.pipeline.stage(ours, others, message, of, stage)

        return jax.vjp(run, ours, message)[1](back)


def _over_stages(tree: Any, layout: Layout, axis: int = 0) -> Any:
    """The tree with that axis of every array split over `stage`, its other axes as they are."""

    def place(x: Array) -> Array:
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(*(STAGE if i == axis else free for i in range(x.ndim)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

    return jax.tree.map(place, tree)


def _chunk(x: Array, repeat: Array) -> Array:
    """`[v, p, …] -> [p, …]`, of each stage the chunk whose turn it is."""
    if x.shape[0] == 1:
        return x[0]
    return jax.vmap(lambda mine, turn: mine[turn], in_axes=(1, 0))(x, repeat)


def _slot(x: Array, slot: Array) -> Array:
    """`[p, slots, …] -> [p, …]`, of each stage another slot."""
    return jax.vmap(lambda mine, turn: mine[turn])(x, slot)


def _shift(tree: Any, by: int, around: bool = False) -> Any:
    """Every stage's part to the next one (1) or the one before (-1). The last one's leaves, or goes
    `around` the ring; to where nobody's goes come zeros.
    """
    return jax.tree.map(lambda x: _rolled(x, by) if around else _moved(x, by), tree)


def _moved(x: Array, by: int) -> Array:
    rest = [(0, 0, 0)] * (x.ndim - 1)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0), *rest])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rolled(x: Array, by: int) -> Array:
    """Its gradient is the same the other way; of its own, JAX makes pads and sums of it."""
    return jnp.roll(x, by, axis=0)


_rolled.defvjp(
    lambda x, by: (jnp.roll(x, by, axis=0), None),
    lambda by, _, back: (jnp.roll(back, -by, axis=0),),
)


def _at(tree: Any, stage: int) -> Any:
    return jax.tree.map(lambda x: x[stage], tree)


def _broadcast(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _where(chosen: Array, tree: Any, others: Any) -> Any:
    """By stage: the first tree where `chosen bool[p]`, else the second."""
    return jax.tree.map(
        lambda x, y: jnp.where(chosen.reshape(-1, *(1,) * (y.ndim - 1)), x, y), tree, others
    )


def _repeated(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), tree)


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, more)
