"""One run over several clusters that only a slow network joins (Holmes, arXiv 2312.03549): which
axis of the mesh should cross it, which cluster gets which pipeline stages, and how many layers.

Over the slow network go either messages between stages, `2 batch length d_model` values a step and
edge, or gradients, once a step: so the batch decides. Everything else stays inside clusters
(`sharding.place`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import ModelConfig
from planning.hardware import Hardware, hardware
from planning.memory import Split, outside_parameters, parameters_of, training_memory
from planning.operators import Work, operators
from planning.roofline import Efficiency, seconds, timed
from planning.stages import slowest, split_layers
from sharding import Cluster, PipelineConfig, pipeline_schedule
from sharding.clusters import stage_clusters
from sharding.stage_layers import moves
from weights import nearest

GRADIENT_BYTES = 4
GIB = 2**30
SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True)
class Site:
    """A cluster as its owner describes it: where its hosts stand, what their devices are, how many
    a host has, and the share of the peaks that they reach.
    """

    cluster: Cluster
    hardware: Hardware
    devices: int
    efficiency: float = 1.0

    @property
    def all_devices(self) -> int:
        """Of all hosts."""
        return self.cluster.hosts * self.devices


@dataclass(frozen=True)
class Sites:
    """Clusters, and what joins them.

    between: one-way bandwidth of a host towards other clusters, bytes/s. measured: whether speeds
    are measured, or follow from peaks and efficiency.
    """

    sites: tuple[Site, ...]
    between: float
    measured: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Devices of each cluster."""
        return {site.cluster.name: site.all_devices for site in self.sites}

    @property
    def hosts(self) -> int:
        """Of the smallest cluster: so many send over the slow network at once."""
        return min(site.cluster.hosts for site in self.sites)


@dataclass(frozen=True)
class Job:
    """What is trained: `batch` sequences of `length` tokens a step. tensor, context: devices that
    share a matrix, and a sequence. wide: bytes of an activation. remat: whether blocks are computed
    anew on the way back.
    """

    model: ModelConfig
    batch: int
    length: int
    tensor: int = 1
    context: int = 1
    wide: int = 2
    remat: bool = True

    @property
    def inner(self) -> int:
        """Devices that work on the same sequences."""
        return self.tensor * self.context

    @property
    def passes(self) -> int:
        """Forward passes that a step costs."""
        return 3 + self.remat


@dataclass(frozen=True)
class Crossing:
    """One way to lay the run over the clusters, and what it comes to in a step.

    axis: of the mesh that crosses the slow network, "stage" or "data". stages, micro_batches,
    schedule: of the pipeline; 1 and empty where there is none. shards: of the batch, in a stage or
    in all. layers: of each stage, by its speed. clusters: that each stage is in. messages, sums:
    bytes that all devices together send over the slow network, activations and gradients. compute:
    seconds of computing, a pipeline's idle time counted; compute_equal: with equal layers. network:
    seconds of the slow network.
    memory: bytes of the fullest device.
    """

    axis: str
    stages: int
    micro_batches: int
    shards: int
    layers: tuple[int, ...]
    clusters: tuple[str, ...]
    messages: float
    sums: float
    compute: float
    compute_equal: float
    network: float
    memory: float
    schedule: str = ""

    @property
    def sent(self) -> float:
        """Bytes over the slow network in a step."""
        return self.messages + self.sums

    @property
    def seconds(self) -> float:
        """Of a step, in which computing and network hide behind each other."""
        return max(self.compute, self.network)


def choose(job: Job, sites: Sites, reserve: float = 0.1) -> tuple[str, dict[str, Crossing]]:
    """The axis that should cross the slow network, the one that sends less over it, and the best
    plan of each axis that fits. reserve: share of a device's memory that stays free.

    Raises `ValueError` if none does, saying by how much, or which batch would divide.
    """
    plans = [*stage_plans(job, sites), *data_plans(job, sites)]
    limit = (1 - reserve) * min(site.hardware.memory_bytes for site in sites.sites)
    fitting = [plan for plan in plans if plan.memory <= limit]
    if not fitting:
        raise ValueError(_why_none(job, sites, plans, limit))
    best: dict[str, Crossing] = {}
    for plan in sorted(fitting, key=lambda plan: (plan.seconds, plan.stages, plan.sent)):
        best.setdefault(plan.axis, plan)
    return min(best, key=lambda axis: best[axis].sent), best


def stage_plans(job: Job, sites: Sites) -> Iterator[Crossing]:
    """Every pipeline whose stages lie inside clusters and that batch and layers divide over."""
    total, most = sum(sites.counts.values()), math.gcd(*sites.counts.values())
    for in_stage in (n for n in range(job.inner, most + 1, job.inner) if most % n == 0):
        stages, shards = total // in_stage, in_stage // job.inner
        if job.model.num_layers % stages or job.batch % shards:
            continue
        rows = job.batch // shards
        for micro_batches in (m for m in range(stages, rows + 1) if rows % m == 0):
            for name in SCHEDULES:
                yield stage_plan(job, sites, stages, micro_batches, name)


def stage_plan(
    job: Job, sites: Sites, stages: int, micro_batches: int, name: str = "gpipe"
) -> Crossing:
    """A pipeline over the clusters with `train.pipeline.outside="repeated"`: in every tick messages
    go over each edge between clusters, forward and later back, and once the gradients of what
    stands outside the layers, and layers that are not run where they are stored. name: of the
    schedule.
    """
    schedule = pipeline_schedule(PipelineConfig(name), stages, micro_batches)
    owners, clusters = stage_clusters(stages, sites.counts), len(sites.sites)
    by_name = {site.cluster.name: site for site in sites.sites}
    speeds = [by_name[owner].cluster.speed for owner in owners]
    in_stage, ticks = sum(sites.counts.values()) // stages, schedule.forward_ticks
    shards = in_stage // job.inner
    rows = job.batch / shards / micro_batches
    one = rows * shards * job.length * job.model.d_model * job.wide * job.tensor
    messages = 2 * ticks * one * (clusters - 1)
    sums = 2 * (clusters - 1) * GRADIENT_BYTES * outside_parameters(job.model)
    equal = (job.model.num_layers // stages,) * stages
    layers = split_layers(job.model.num_layers, speeds) if job.context == 1 else equal
    sums += 2 * GRADIENT_BYTES * _moved(layers, owners) * _layer_parameters(job.model)
    tick = rows * (job.passes + schedule.first_first) / job.inner
    senders = min(max(in_stage / site.devices, 1) for site in sites.sites) * sites.between
    split = Split(fsdp=shards, tensor=job.tensor, stage=stages, context=job.context, zero=0)
    memory = training_memory(
        job.model,
        split,
        micro_batch=math.ceil(rows),
        length=job.length,
        remat=job.remat,
        schedule=schedule,
    )
    return Crossing(
        axis="stage",
        stages=stages,
        micro_batches=micro_batches,
        shards=shards,
        layers=layers,
        clusters=owners,
        schedule=name,
        messages=messages,
        sums=sums,
        compute=ticks * tick * slowest(layers, speeds),
        compute_equal=ticks * tick * slowest(equal, speeds),
        network=(messages / 2 / (clusters - 1) + sums / clusters) / senders,
        memory=memory.total * max(layers) / equal[0],
    )


def _moved(layers: tuple[int, ...], owners: Sequence[str]) -> int:
    """Layers that one cluster stores, in equal parts, and another runs: a step sends their weights
    there and their gradients back.
    """
    return sum(
        count
        for move in moves(layers)
        for stage, count in enumerate(move.counts)
        if count and owners[stage - move.by] != owners[stage]
    )


def _layer_parameters(model: ModelConfig) -> float:
    return (parameters_of(model) - outside_parameters(model)) / model.num_layers


def data_plans(job: Job, sites: Sites) -> Iterator[Crossing]:
    """Replicas in every cluster, each over all that the smallest has in common with the others,
    whose gradients are summed over the slow network; none where the batch does not divide.
    """
    total, most = sum(sites.counts.values()), math.gcd(*sites.counts.values())
    shards, clusters = total // job.inner, len(sites.sites)
    if most % job.inner or job.batch % shards:
        return
    sums = 2 * (clusters - 1) * GRADIENT_BYTES * parameters_of(job.model)
    split = Split(
        data=total // most,
        fsdp=most // job.inner,
        tensor=job.tensor,
        context=job.context,
        zero=0,
    )
    rows = job.batch // shards
    for micro_batches in (m for m in range(1, rows + 1) if rows % m == 0):
        memory = training_memory(
            job.model,
            split,
            micro_batch=rows // micro_batches,
            length=job.length,
            remat=job.remat,
        )
        speed = min(site.cluster.speed for site in sites.sites)
        compute = rows * job.passes * job.model.num_layers / speed / job.inner
        yield Crossing(
            axis="data",
            stages=1,
            micro_batches=micro_batches,
            shards=shards,
            layers=(job.model.num_layers,),
            clusters=tuple(sites.counts),
            messages=0.0,
            sums=sums,
            compute=compute,
            compute_equal=compute,
            network=sums / clusters / sites.between / sites.hosts,
            memory=memory.total,
        )


def flags(plan: Crossing, job: Job, sites: Sites) -> str:
    """For `train.py`."""
    parts = {"mesh.tensor": job.tensor, "mesh.context": job.context, "mesh.stage": plan.stages}
    shown = [f"--config.{name}={size}" for name, size in parts.items() if size > 1]
    shown += [f"--config.train.accumulation={plan.micro_batches}"]
    if plan.axis == "data":
        most = math.gcd(*sites.counts.values()) // job.inner
        return " ".join([f"--config.mesh.data=-1 --config.mesh.fsdp={most}", *shown])
    clusters = tuple(
        {"name": site.cluster.name, "hosts": site.cluster.hosts, "link": site.cluster.link}
        for site in sites.sites
    )
    shown += [f"--config.train.pipeline.schedule={plan.schedule}"]
    if len(set(plan.layers)) > 1:
        shown += [f"--config.train.pipeline.layers={','.join(map(str, plan.layers))}"]
    shown += ["--config.train.pipeline.outside=repeated", f'--config.clusters="{clusters}"']
    return " ".join([f"--config.mesh.data=1 --config.mesh.fsdp={plan.shards}", *shown])


def _why_none(job: Job, sites: Sites, plans: Sequence[Crossing], limit: float) -> str:
    if plans:
        least = min(plans, key=lambda plan: plan.memory)
        return (
            f"nothing fits: the nearest plan ({least.axis} over the slow network, {least.stages} "
            f"stages, {least.micro_batches} micro-batches) takes {least.memory / GIB:.1f} GiB of "
            f"{limit / GIB:.1f} GiB on the smallest device"
        )
    counts = sites.counts
    most = math.gcd(*counts.values())
    if most % job.inner:
        return (
            f"tensor x context = {job.inner} does not divide what the clusters have in common, "
            f"{most} devices ({', '.join(f'{name} has {n}' for name, n in counts.items())})"
        )
    return (
        f"a batch of {job.batch} and {job.model.num_layers} layers do not divide over "
        f"{sum(counts.values())} devices in stages of {most} or fewer; a batch of "
        f"{sum(counts.values()) // job.inner} sequences, or a multiple, does"
    )


def layer_speed(job: Job, device: Hardware, efficiency: float) -> float:
    """Layers a second that a device runs forward for one sequence, by the roofline."""
    work = Work(1, job.length, job.length, all_logits=True)
    ops = [op for op in operators(job.model, work) if not op.name.startswith(("head", "embed"))]
    share = Efficiency(*[efficiency] * 3)
    return job.model.num_layers / seconds(timed(ops, device, efficiency=share))


def read_sites(path: str | Path, job: Job, more: Mapping[str, Hardware] | None = None) -> Sites:
    """Clusters of a JSON file:

        {"between": 3e9, "clusters": [
            {"name": "a", "hosts": 4, "devices": 8, "hardware": "h100", "link": 50e9}, …]}

    `efficiency` (of the peaks) or `speed` (layers a second, measured on one device with one
    sequence; of all clusters or of none) may be added to each.

    Raises:
        ValueError: naming file, cluster and field of what is missing, unknown or not a number.
    """
    given = json.loads(Path(path).read_text())
    if not isinstance(given, dict) or set(given) != {"between", "clusters"}:
        raise ValueError(f'{path}: write {{"between": bytes/s, "clusters": […]}}')
    _number(f"{path}: between", given["between"])
    if len(given["clusters"]) < 2:
        raise ValueError(f"{path}: {len(given['clusters'])} clusters; at least 2 are planned for")
    measured = ["speed" in row for row in given["clusters"]]
    if any(measured) and not all(measured):
        raise ValueError(f"{path}: give a speed to every cluster or to none")
    sites = tuple(
        _site(f"{path}: clusters[{index}]", row, job, more)
        for index, row in enumerate(given["clusters"])
    )
    return Sites(sites, given["between"], all(measured))


def _site(where: str, row: Any, job: Job, more: Mapping[str, Hardware] | None) -> Site:
    needed, optional = ("name", "hosts", "devices", "hardware", "link"), ("efficiency", "speed")
    for field in row:
        if field not in needed + optional:
            raise ValueError(
                f"{where}.{field} is unknown; near: {nearest(field, needed + optional)}"
            )
    if missing := [field for field in needed if field not in row]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for field in ("hosts", "devices", "link", *(name for name in optional if name in row)):
        _number(f"{where}.{field}", row[field])
    device, efficiency = hardware(row["hardware"], more), row.get("efficiency", 1.0)
    speed = row.get("speed") or layer_speed(job, device, efficiency)
    cluster = Cluster(row["name"], int(row["hosts"]), float(row["link"]), speed)
    return Site(cluster, device, int(row["devices"]), efficiency)


def _number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{where} is {value!r}; a number above 0")
