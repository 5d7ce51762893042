"""Compiling the real training step for a TPU slice that is not there, and what the compiler says of
it: memory by kind, collectives by axis, and whether it fits.

    plan = compile_training(config, parse_topology("v5p:4x4x8"))

FLOPs come from the operator table, since the compiler counts a loop's body once.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kernels_pallas.tpu_topology import why_not, without_cache
from model import Runtime, count_parameters, init, rules
from planning.collectives import COLLECTIVES, ring_bandwidth, send
from planning.hardware import HARDWARE, Hardware
from planning.hlo import Collective, collectives
from planning.operators import training_flops_per_token
from sharding import bubble_formula, make_layout
from training import RunConfig
from training.decoders import decoder, staged_decoder
from training.objectives import language_model
from training.setup import Functions, prepare, run_mesh
from training.task import FunctionStream, Task, tokens_by_length
from weights import nearest

NAMES = {"v4": "tpu-v4", "v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e", "tpu7x": "tpu-7x"}
"""Generation in a topology's name -> row of the hardware table."""


@dataclass(frozen=True)
class Topology:
    """A TPU slice, or several joined by the data centre's network.

    generation: of `NAMES`. shape: chips along each axis of the torus. slices: how many.
    """

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As libtpu calls one slice."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def hardware(self) -> Hardware:
        """Figures of one chip."""
        return HARDWARE[NAMES[self.generation]]


def parse_topology(name: str, slices: int = 1) -> Topology:
    """`v5p:8x8x16`, or `2*v5e:16x16` for two slices. Raises `ValueError` saying what would be
    right.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", name)
    if not found:
        raise ValueError(f"topology {name!r}: write generation:AxBxC, such as v5p:4x4x8")
    generation = found[2]
    if generation not in NAMES:
        near = nearest(generation, NAMES) or ", ".join(NAMES)
        raise ValueError(f"topology {name!r}: no generation {generation!r}; nearest: {near}")
    shape = tuple(int(size) for size in found[3].split("x"))
    wanted = HARDWARE[NAMES[generation]].torus
    if len(shape) != wanted and not (generation == "v4" and len(shape) == 3):
        raise ValueError(f"topology {name!r}: {generation} has {wanted} axes, not {len(shape)}")
    return Topology(generation, shape, int(found[1] or slices))


def described_devices(topology: Topology) -> list[Any]:
    """Devices of a topology; no TPU is needed. Raises `ValueError` for a shape that the compiler
    does not know, with its reason.
    """
    from jax.experimental import topologies

    if (reason := why_not()) is not None:
        raise ValueError(f"topology {topology.name}: {reason}, or install Sheaf with [tpu]")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    more = {} if topology.slices == 1 else {"num_slices": topology.slices}
    try:
        described = topologies.get_topology_desc(
            topology_name=topology.name, platform="tpu", **more
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {topology.name}: the compiler refuses it: {reason}") from error
    return list(described.devices)


@dataclass(frozen=True)
class Plan:
    """What a compiled step takes; bytes and seconds are of one device.

    devices: as JAX shows them. mesh: axis -> size. parameter_count, tokens: of model and step.
    parameters, optimizer, batch: bytes of what goes in. temporaries: bytes that the compiler needs
    beside them: activations, gradients, copies. limit: memory of a device. flops: model FLOPs of
    the step on all devices. compute_seconds: at the peak, with what is recomputed and a pipeline's
    idle ticks. network_seconds: collectives one after another, nothing overlapped; between_slices:
    the part of it on the data centre's network. compile_seconds: what compiling took here.
    """

    topology: Topology
    devices: int
    mesh: dict[str, int]
    parameter_count: int
    tokens: int
    parameters: float
    optimizer: float
    batch: float
    temporaries: float
    limit: float
    flops: float
    compute_seconds: float
    network_seconds: float
    between_slices: float
    collectives: tuple[Collective, ...]
    compile_seconds: float

    @property
    def memory(self) -> float:
        """Bytes at the peak."""
        return self.parameters + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether that is within the device's memory."""
        return self.memory <= self.limit

    @property
    def overlapped_seconds(self) -> float:
        """Step time if all communication hides behind computing, or computing behind it."""
        return max(self.compute_seconds, self.network_seconds)

    @property
    def serial_seconds(self) -> float:
        """Step time if nothing overlaps."""
        return self.compute_seconds + self.network_seconds

    def utilization(self, seconds: float) -> float:
        """MFU of a step that takes so long."""
        peak = self.topology.hardware.bf16_flops * self.topology.chips
        return self.flops / (seconds * peak)

    @property
    def limited_by(self) -> str:
        """What to look at first."""
        if not self.fits:
            return "memory"
        return "network" if self.network_seconds > self.compute_seconds else "compute"


def compile_training(config: RunConfig, topology: Topology) -> Plan:
    """Compile a config's training step for a topology.

    Raises `ValueError` for meshes, batches or rules that do not fit, as training would; compiler
    errors go through unchanged, but that for too little memory, which names both amounts.
    """
    if config.model is None or config.data is None:
        raise ValueError("config.model and config.data are needed to plan a run")
    devices = described_devices(topology)
    mesh = run_mesh(config, devices)
    functions = _functions(config, mesh)
    batch = _abstract_batch(functions, config.data.length)
    began = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), without_cache():
        compiled = functions.step.lower(functions.abstract, batch).compile()
    return _plan(config, topology, functions, batch, compiled, time.monotonic() - began)


def _functions(config: RunConfig, mesh: Mesh) -> Functions:
    assert config.model is not None
    assert config.data is not None
    model = config.model.resolve()
    layout = make_layout(mesh, config.sharding)
    runtime = Runtime(
        compute_dtype=config.train.compute_dtype,
        remat=config.train.remat,
        layout=layout,
        scan_unroll=max(config.train.scan_unroll, 1),
    )
    task = Task(
        init=lambda key: init(model, key),
        apply=decoder(model, runtime),
        objective=language_model(
            config.train.z_loss,
            config.train.label_smoothing,
            config.train.auxiliary,
            report=config.train.report,
        ),
        stream=FunctionStream(lambda step: {}),
        rules=rules(model),
        batch_axes=tokens_by_length,
        batch_size=config.data.batch_size,
        model=model,
        staged=staged_decoder(model, runtime),
    )
    return prepare(task, config, layout)


def _abstract_batch(functions: Functions, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    shape = (functions.task.batch_size, length)
    small = np.zeros((1, length), np.int32)
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            jnp.float32 if name == "loss_mask" else jnp.int32,
            sharding=functions.layout.sharding(functions.task.batch_axes(name, small)),
        )
        for name in names
    }


def _plan(
    config: RunConfig,
    topology: Topology,
    functions: Functions,
    batch: dict[str, jax.ShapeDtypeStruct],
    compiled: Any,
    seconds: float,
) -> Plan:
    assert config.model is not None
    assert config.data is not None
    model, length = config.model.resolve(), config.data.length
    mesh = dict(functions.layout.mesh.shape)
    memory, hardware = compiled.memory_analysis(), topology.hardware
    state = functions.abstract
    parameters = _bytes_on_a_device(state.params)
    batch_bytes = _bytes_on_a_device(batch)
    found = tuple(collectives(compiled.as_text(), mesh))
    tokens = config.data.batch_size * length
    chips = topology.chips
    flops = training_flops_per_token(model, length) * tokens
    pipeline, stages = config.train.pipeline, mesh["stage"]
    alternate = stages > 1 and pipeline.schedule == "1f1b"
    passes = 3 + (config.train.remat == "full") + alternate
    idle = bubble_formula(stages, config.train.accumulation, pipeline.repeats)
    computed = flops * passes / 3 / chips / (1 - idle)
    per_chip = len(functions.layout.mesh.devices.flat) // chips
    within, between = _network_seconds(found, hardware)
    return Plan(
        topology=topology,
        devices=functions.layout.mesh.size,
        mesh=mesh,
        parameter_count=count_parameters(model),
        tokens=tokens,
        parameters=parameters,
        optimizer=_bytes_on_a_device(state) - parameters,
        batch=batch_bytes,
        temporaries=memory.temp_size_in_bytes,
        limit=hardware.memory_bytes / per_chip,
        flops=flops,
        compute_seconds=computed / hardware.bf16_flops,
        network_seconds=within + between,
        between_slices=between,
        collectives=found,
        compile_seconds=seconds,
    )


def _bytes_on_a_device(tree: Any) -> float:
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return float(total)


def _network_seconds(found: Sequence[Collective], hardware: Hardware) -> tuple[float, float]:
    """Seconds on the torus's links and on the network between slices, one after another."""
    within = between = 0.0
    link = ring_bandwidth(hardware)
    for each in found:
        if each.kind == "between_slices":
            between += each.count * send(each.size, hardware.network_bandwidth)
        elif each.kind == "permute":
            within += each.count * send(each.size, hardware.link_bandwidth)
        elif each.kind in COLLECTIVES and each.devices > 1:
            seconds = COLLECTIVES[each.kind](each.devices, each.size, link, 1e-6)
            within += each.count * seconds
    return within, between
