"""Which mesh to train on: every legal one, pruned by memory, ranked by an analytical step time.

The step is a roofline of its operators and closed forms of its collectives, each on the links that
its axis gets: axes are laid from the inside out as `sharding.mesh` does, and those that leave the
fast links' domain go over the network. Gradients and gathered weights hide behind computing as far
as it lasts; sums of tensor parallelism and experts' exchanges do not.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from model import ModelConfig
from model.parameters import describe
from planning.collectives import COLLECTIVES, ring_bandwidth, send
from planning.hardware import Hardware
from planning.memory import Memory, Split, stage_parameters, training_memory
from planning.operators import Op, Work, operators, training_flops_per_token
from planning.roofline import Efficiency, seconds, timed
from sharding import PipelineConfig, Schedule, pipeline_schedule

INNER_FIRST = ("tensor", "context", "stage", "expert", "fsdp", "data")
"""Axes from the nearest neighbours outwards, as `sharding.mesh.AXES` lays them."""
SCHEDULES = ("gpipe", "1f1b")
"""Of pipelines. Interleaved ones cost nothing more in this model, so they would always win."""


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind.

    devices: how many. efficiency: shares of the peaks that are reached. reserve: share of a
    device's memory that stays free for the compiler's copies.
    """

    hardware: Hardware
    devices: int
    efficiency: Efficiency = Efficiency()
    reserve: float = 0.1


@dataclass(frozen=True)
class Run:
    """What is trained: `batch` sequences of `length` tokens a step. stages: consider pipelines."""

    model: ModelConfig
    batch: int
    length: int
    stages: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one device: computing, sums that wait, exchanges that may hide, idle
    time of the pipeline.
    """

    compute: float
    exposed: float
    hidden: float
    bubble: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(self.compute + self.exposed, self.hidden) + self.bubble


@dataclass(frozen=True)
class Candidate:
    """A plan: its axes, sequences of a micro-batch on each data shard, micro-batches, whether it
    recomputes, the name of its pipeline's schedule; what it takes.
    """

    split: Split
    micro_batch: int
    accumulation: int
    remat: bool
    memory: Memory
    time: StepTime
    utilization: float
    schedule: str = ""

    def flags(self) -> str:
        """For `train.py` and `planning compile`."""
        axes = {axis: getattr(self.split, axis) for axis in INNER_FIRST[::-1]}
        mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in axes.items() if size > 1)
        remat = "full" if self.remat else "none"
        rest = f"--config.train.accumulation={self.accumulation} --config.train.remat={remat}"
        if self.schedule:
            rest += f" --config.train.pipeline.schedule={self.schedule}"
        return f"{mesh or '--config.mesh.data=1'} {rest}"


def search(run: Run, cluster: Cluster, top: int = 10) -> list[Candidate]:
    """The fastest plans that fit, the best first.

    Raises `ValueError` if none fits, saying by how much the nearest exceeds the memory.
    """
    limit = cluster.hardware.memory_bytes * (1 - cluster.reserve)
    fitting: list[Candidate] = []
    nearest: Candidate | None = None
    for split in legal_splits(run, cluster.devices):
        for candidate in _candidates(run, cluster, split):
            if candidate.memory.total <= limit:
                fitting.append(candidate)
            elif nearest is None or candidate.memory.total < nearest.memory.total:
                nearest = candidate
    if not fitting:
        raise ValueError(_why_none(run, cluster, limit, nearest))
    return sorted(fitting, key=lambda each: (each.time.seconds, each.memory.total))[:top]


def legal_splits(run: Run, devices: int) -> Iterator[Split]:
    """Every division of the devices that the model's and the batch's sizes allow."""
    layers = [segment.layer for segment in run.model.segments]
    heads = math.gcd(
        *(layer.kv_heads or 1 for layer in layers), *(layer.num_heads for layer in layers)
    )
    widths = math.gcd(*(layer.d_ff or 1 for layer in layers), run.model.vocab_size)
    experts = math.gcd(*(layer.num_experts for layer in layers)) if _is_mixture(run.model) else 1
    sizes = [d for d in range(1, devices + 1) if devices % d == 0]
    for tensor, context, stage, expert in itertools.product(sizes, repeat=4):
        inner = tensor * context * stage * expert
        if devices % inner or heads % tensor or widths % tensor or run.length % context:
            continue
        if experts % expert or (stage > 1 and not _may_be_staged(run, stage)):
            continue
        for fsdp in sizes:
            data = devices // inner // fsdp if devices // inner % fsdp == 0 else 0
            if data and run.batch % (data * fsdp * expert) == 0:
                yield Split(data, fsdp, tensor, stage, context, expert, zero=0)


def _candidates(run: Run, cluster: Cluster, split: Split) -> Iterator[Candidate]:
    rows = run.batch // (split.data * split.fsdp * split.expert)
    for accumulation in (n for n in range(1, rows + 1) if rows % n == 0):
        if split.stage > 1 and accumulation < split.stage:
            continue
        for remat, name in itertools.product(
            (False, True), SCHEDULES if split.stage > 1 else ("",)
        ):
            yield _candidate(run, cluster, split, accumulation, remat, name)


def _candidate(
    run: Run, cluster: Cluster, split: Split, accumulation: int, remat: bool, name: str
) -> Candidate:
    micro = run.batch // (split.data * split.fsdp * split.expert) // accumulation
    schedule = pipeline_schedule(PipelineConfig(name), split.stage, accumulation) if name else None
    memory = training_memory(
        run.model, split, micro_batch=micro, length=run.length, remat=remat, schedule=schedule
    )
    time = step_time(run, cluster, split, accumulation, remat=remat, schedule=schedule)
    flops = _flops_per_token(run.model, run.length) * run.batch * run.length
    peak = cluster.devices * cluster.hardware.bf16_flops
    used = flops / (time.seconds * peak)
    return Candidate(split, micro, accumulation, remat, memory, time, used, name)


def step_time(
    run: Run,
    cluster: Cluster,
    split: Split,
    accumulation: int = 1,
    *,
    remat: bool = True,
    schedule: Schedule | None = None,
) -> StepTime:
    """Seconds of a training step under a plan. 1F1B computes a stage's pass anew, and under `remat`
    its blocks once more.
    """
    model, hardware = run.model, cluster.hardware
    rows = run.batch // (split.data * split.fsdp * split.expert * accumulation)
    links = _links(split, cluster)
    work = Work(max(rows, 1), run.length, run.length, all_logits=True)
    ops = _operators(model, work, split.tensor)
    forward = seconds(timed(ops, hardware, efficiency=cluster.efficiency))
    forward /= split.stage * split.context
    passes = 3 + remat + (schedule is not None and schedule.first_first)
    compute = passes * forward * accumulation

    tokens = rows * run.length / split.context
    sums = sum(op.reduced * op.count for op in ops) / split.stage / split.context
    exposed = (
        (4 + (2 if remat else 0))
        / 2
        * _time("all_reduce", split.tensor, sums, links["tensor"], hardware.latency_seconds)
    )
    if split.expert > 1:
        routed = tokens * model.d_model * 2 * _experts_per_token(model)
        once = _time("all_to_all", split.expert, routed, links["expert"], hardware.latency_seconds)
        exposed += 2 * (3 if remat else 2) * once * _mixture_layers(model) / split.stage
    if split.context > 1:
        layer = model.layer(0)
        keys = 4 * tokens * (layer.kv_heads or 1) * (layer.head_dim or 1) / split.tensor
        ring = (split.context - 1) * send(keys, links["context"], hardware.latency_seconds)
        exposed += 3 * max(ring * model.num_layers / split.stage - forward, 0.0)
    if split.stage > 1:
        sent = 2 * tokens * model.d_model
        exposed += 2 * send(sent, links["stage"], hardware.latency_seconds)
    exposed *= accumulation

    share = stage_parameters(model, split.stage) / (split.tensor * split.expert)
    gathers = 2 * _time(
        "all_gather", split.fsdp, 2 * share, links["fsdp"], hardware.latency_seconds
    )
    scatter = _time(
        "reduce_scatter", split.fsdp, 4 * share, links["fsdp"], hardware.latency_seconds
    )
    hidden = (gathers + scatter) * accumulation
    hidden += _time(
        "all_reduce", split.data, 4 * share / split.fsdp, links["data"], hardware.latency_seconds
    )
    bubble = (split.stage - 1) / accumulation * (compute + exposed)
    return StepTime(compute, exposed, hidden, bubble)


def _links(split: Split, cluster: Cluster) -> dict[str, float]:
    """One-way bytes/s that each axis gets: inside the fast links' domain, or over the network."""
    links, used = {}, 1
    for axis in INNER_FIRST:
        used *= getattr(split, axis)
        fast = used <= cluster.hardware.domain
        link = ring_bandwidth(cluster.hardware) if fast else cluster.hardware.network_bandwidth
        links[axis] = link * cluster.efficiency.network
    return links


def _time(kind: str, devices: int, size: float, link: float, latency: float) -> float:
    return COLLECTIVES[kind](devices, size, link, latency) if devices > 1 else 0.0


@functools.cache
def _flops_per_token(model: ModelConfig, length: int) -> float:
    return training_flops_per_token(model, length)


@functools.cache
def _operators(model: ModelConfig, work: Work, tensor: int) -> tuple[Op, ...]:
    return tuple(operators(model, work, tensor=tensor))


def _may_be_staged(run: Run, stages: int) -> bool:
    """Whether a pipeline of equal stages can run the layers (`training.setup.staged_step`)."""
    equal = len(run.model.segments) == 1 and run.model.num_layers % stages == 0
    return run.stages and equal


@functools.cache
def _is_mixture(model: ModelConfig) -> bool:
    return any("experts" in spec.axes for spec, _ in describe(model).values())


@functools.cache
def _mixture_layers(model: ModelConfig) -> int:
    return sum(len(s) for s in model.segments if s.layer.feed_forward == "experts")


@functools.cache
def _experts_per_token(model: ModelConfig) -> int:
    return max(segment.layer.experts_per_token for segment in model.segments)


def _why_none(run: Run, cluster: Cluster, limit: float, nearest: Candidate | None) -> str:
    gib = 2**30
    if nearest is None:
        return (
            f"no mesh of {cluster.devices} devices divides the model and a batch of {run.batch}; "
            f"try a batch that is a multiple of {cluster.devices}"
        )
    wanted = math.ceil(cluster.devices * nearest.memory.total / limit)
    return (
        f"nothing fits: the nearest plan ({nearest.flags()}) takes "
        f"{nearest.memory.total / gib:.1f} GiB of {limit / gib:.1f} GiB a device; about {wanted} "
        "such devices would do"
    )
