"""Compiling the real training step for a TPU slice that is not there, and what the compiler says of
it: memory by kind, collectives by axis, and whether it fits.

    plan = compile_training(config, parse_topology("v5p:4x4x8"))

FLOPs come from the operator table, since the compiler counts a loop's body once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kernels_pallas import tpu_topology
from kernels_pallas.tpu_topology import why_not, without_cache
from model import count_parameters
from planning.collectives import COLLECTIVES, ring_bandwidth, send
from planning.hardware import HARDWARE, Hardware
from planning.hlo import Collective, collectives
from planning.operators import training_flops_per_token
from sharding import bubble_formula, make_layout
from training import RunConfig
from training.language_model import model_functions
from training.setup import Functions, prepare, run_mesh
from training.task import FunctionStream, Task
from weights import nearest

_MEMORY = (
    re.compile(
        r"required for .*? \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
    ),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
"""How the compiler says that memory ran out: what it takes, and what there is, in binary units."""
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

    def device(self, devices: int) -> Hardware:
        """Figures of one device, where JAX shows so many on all chips."""
        chip, share = self.hardware, devices // self.chips
        return dataclasses.replace(
            chip,
            bf16_flops=chip.bf16_flops / share,
            int8_ops=chip.int8_ops / share,
            fp8_flops=chip.fp8_flops / share,
            memory_bytes=chip.memory_bytes / share,
            bandwidth=chip.bandwidth / share,
        )


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
    if (reason := why_not()) is not None:
        raise ValueError(f"topology {topology.name}: {reason}, or install Sheaf with [tpu]")
    try:
        return tpu_topology.described_devices(topology.name, topology.slices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {topology.name}: the compiler refuses it: {reason}") from error


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

    def figures(self) -> dict[str, Any]:
        """All fields, and what follows from them, for JSON."""
        return {
            **dataclasses.asdict(self),
            "memory": self.memory,
            "fits": self.fits,
            "mfu_serial": self.utilization(self.serial_seconds),
            "mfu_overlapped": self.utilization(self.overlapped_seconds),
            "limited_by": self.limited_by,
        }

    @property
    def limited_by(self) -> str:
        """What to look at first."""
        if not self.fits:
            return "memory"
        return "network" if self.network_seconds > self.compute_seconds else "compute"


class TooLittleMemory(ValueError):
    """A program that no device of the topology can hold; the message says by how much."""


@contextlib.contextmanager
def memory_named() -> Iterator[None]:
    """Raise `TooLittleMemory` for what the compiler says when memory runs out."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = next(filter(None, (form.search(str(error)) for form in _MEMORY)), None)
        if found is None:
            raise
        takes, limit = (
            float(found[n]) * 2.0 ** (10 * " KMGT".index(found[n + 1] or " ")) / 2**30
            for n in (1, 3)
        )
        raise TooLittleMemory(
            f"it takes {takes:.1f} GiB of a device's {limit:.1f} GiB, {takes - limit:.1f} GiB too "
            "much"
        ) from error


def compile_training(config: RunConfig, topology: Topology) -> Plan:
    """Compile a config's training step for a topology.

    Raises `ValueError` for meshes, batches or rules that do not fit, as training would, and
    `TooLittleMemory` where the compiler finds no room; its other errors go through unchanged.
    """
    if config.model is None or config.data is None:
        raise ValueError("config.model and config.data are needed to plan a run")
    devices = described_devices(topology)
    mesh = run_mesh(config, devices)
    functions = _functions(config, mesh)
    batch = _abstract_batch(functions, config.data.length)
    began = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), without_cache(), memory_named():
        compiled = compiled_with_text(functions.step.lower(functions.abstract, batch))
    return _plan(config, topology, functions, batch, compiled, time.monotonic() - began)


def compiled_with_text(lowered: Any) -> tuple[Any, str]:
    """A compiled program and its optimized HLO, as the compiler itself writes it: JAX cannot print
    exchanges that run on a TPU's sparse cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        written = sorted(Path(folder).glob("*.after_optimizations.txt"))
        return compiled, written[-1].read_text() if written else compiled.as_text()


def _functions(config: RunConfig, mesh: Mesh) -> Functions:
    assert config.data is not None
    rows, layout = config.data.batch_size, make_layout(mesh, config.sharding)
    unroll = max(config.train.scan_unroll, 1)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, scan_unroll=unroll)
    )
    task = Task(
        **model_functions(config, layout),
        stream=FunctionStream(lambda step: {}),
        batch_size=rows,
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
    compiled: tuple[Any, str],
    seconds: float,
) -> Plan:
    assert config.model is not None
    assert config.data is not None
    model, length = config.model.resolve(), config.data.length
    mesh = dict(functions.layout.mesh.shape)
    memory, hardware = compiled[0].memory_analysis(), topology.hardware
    state = functions.abstract
    parameters = bytes_on_a_device(state.params)
    batch_bytes = bytes_on_a_device(batch)
    found = tuple(collectives(compiled[1], mesh))
    tokens = config.data.batch_size * length
    chips = topology.chips
    flops = training_flops_per_token(model, length) * tokens
    pipeline, stages = config.train.pipeline, mesh["stage"]
    alternate = stages > 1 and pipeline.schedule == "1f1b"
    recomputed = config.train.remat in ("full", "save_attention")
    passes = 3 + recomputed + alternate
    idle = bubble_formula(stages, config.train.accumulation, pipeline.repeats)
    computed = flops * passes / 3 / chips / (1 - idle)
    within, between = network_seconds(found, hardware)
    return Plan(
        topology=topology,
        devices=functions.layout.mesh.size,
        mesh=mesh,
        parameter_count=count_parameters(model),
        tokens=tokens,
        parameters=parameters,
        optimizer=bytes_on_a_device(state) - parameters,
        batch=batch_bytes,
        temporaries=memory.temp_size_in_bytes,
        limit=topology.device(functions.layout.mesh.size).memory_bytes,
        flops=flops,
        compute_seconds=computed / hardware.bf16_flops,
        network_seconds=within + between,
        between_slices=between,
        collectives=found,
        compile_seconds=seconds,
    )


def bytes_on_a_device(tree: Any) -> float:
    """Of the part of all arrays that a device holds."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return float(total)


def network_seconds(found: Sequence[Collective], hardware: Hardware) -> tuple[float, float]:
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
