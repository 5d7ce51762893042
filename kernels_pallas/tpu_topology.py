"""The five TPU generations that kernels are compiled for, and compilation without a TPU.

`libtpu` compiles for a described topology on any machine; what it returns says whether a kernel
lowers, how much of the on-chip memory it takes and what the compiler expects it to cost. Tests and
benchmarks stand on this file; kernels read `GENERATIONS` for their block sizes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MIB = 2**20
_SERIALIZED = "serialized:"


@dataclass(frozen=True)
class Generation:
    """One TPU generation. Figures are of one tensor core, as the vendor publishes them.

    topology: name of the smallest slice that `libtpu` describes.
    device_kind: what `jax.Device.device_kind` says.
    cores: tensor cores that JAX shows as one device (a chip of v5p is one device of two cores; a
        chip of TPU7x is two devices).
    vmem_bytes, hbm_bytes: on-chip vector memory, and memory.
    hbm_bandwidth: bytes/s.
    bfloat16, int8, int4, float8: operations/s of a matrix product, twice its multiply-adds; 0 where
        the matrix unit does not take the type.
    matrix_unit: rows and columns of the systolic array.
    """

    topology: str
    device_kind: str
    cores: int
    vmem_bytes: int
    hbm_bytes: int
    hbm_bandwidth: float
    bfloat16: float
    int8: float
    int4: float
    float8: float
    matrix_unit: int


GENERATIONS: dict[str, Generation] = {
    "v4": Generation(
        "v4:2x2x1", "TPU v4", 1, 16 * MIB, 17_200_000_000, 0.615e12, 137.5e12, 0, 0, 0, 128
    ),
    "v5e": Generation(
        "v5e:2x2",
        "TPU v5 lite",
        1,
        128 * MIB,
        17_200_000_000,
        0.82e12,
        197e12,
        394e12,
        788e12,
        0,
        128,
    ),
    "v5p": Generation(
        "v5p:2x2x1",
        "TPU v5",
        2,
        64 * MIB,
        51_500_000_000,
        1.23e12,
        229.5e12,
        459e12,
        920e12,
        0,
        128,
    ),
    "v6e": Generation(
        "v6e:2x2",
        "TPU v6 lite",
        1,
        128 * MIB,
        34_400_000_000,
        1.64e12,
        920e12,
        1840e12,
        3680e12,
        920e12,
        256,
    ),
    "7x": Generation(
        "tpu7x:2x2x1",
        "TPU7x",
        1,
        64 * MIB,
        103_000_000_000,
        3.7e12,
        1155e12,
        0,
        0,
        2300e12,
        256,
    ),
}
"""Name -> figures; they agree with those in JAX's own table (a test holds it)."""


def generation_of(device_kind: str) -> str | None:
    """Name in `GENERATIONS` of a `jax.Device.device_kind`; None if it is another."""
    names = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"}
    names |= {figures.device_kind: name for name, figures in GENERATIONS.items()}
    return names.get(device_kind)


def why_not() -> str | None:
    """Why nothing can be compiled for a TPU here; None if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install libtpu)"
    return None


def described_devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices that need not exist, of a topology as `libtpu` names it. What `libtpu` asks of the
    environment it reads once a process, so it is told here, and nowhere else.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    more = {} if slices == 1 else {"num_slices": slices}
    described = topologies.get_topology_desc(topology_name=topology, platform="tpu", **more)
    return list(described.devices)


def described_mesh(generation: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of devices that need not exist, of one device or as `axes` (name -> size) says."""
    axes = dict(axes or {"device": 1})
    described = described_devices(GENERATIONS[generation].topology)
    count = int(np.prod(list(axes.values())))
    if count > len(described):
        raise ValueError(
            f"a mesh of {axes} takes {count} devices; {GENERATIONS[generation].topology} "
            f"describes {len(described)}"
        )
    devices = np.asarray(described[:count]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program for one generation.

    text: the scheduled program, as HLO or, where that cannot be printed, serialized.
    vmem_bytes: on-chip memory of each kernel, in the order of the program; blocks with their double
        buffers, scratch, and what the compiler spills. 0 where the compiler does not tell.
    argument_bytes, output_bytes, temp_bytes: memory of the program.
    flops, bytes_accessed: the compiler's count; inside a kernel it only knows the kernel's own
        `cost_estimate`.
    seconds: the compiler's roofline estimate, from the same; None where it gives none.
    """

    text: str
    vmem_bytes: tuple[int, ...]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    flops: float
    bytes_accessed: float
    seconds: float | None


def compile_for(
    function: Callable[..., Any],
    shapes: Any,
    generation: str,
    *,
    axes: Mapping[str, int] | None = None,
    specs: Any = None,
    mesh: Mesh | None = None,
) -> Compiled:
    """Compile `function(*shapes)` for a TPU generation; neither a TPU nor arrays are needed.

    Args:
        function: traceable; jitted here. It is traced inside the described mesh, so a function that
            asks `jax.sharding.get_abstract_mesh()` for its platform sees a TPU.
        shapes: tuple of pytrees of arrays or `jax.ShapeDtypeStruct`.
        generation: a name in `GENERATIONS`.
        axes: name -> size of the mesh; None is one device.
        specs: `PartitionSpec`s, one an argument; None replicates.
        mesh: one made by `described_mesh` already, for a function that holds it (`jax.shard_map`).

    Raises whatever the compiler raises, unchanged.
    """
    where = described_mesh(generation, axes) if mesh is None else mesh
    specs = specs if specs is not None else (PartitionSpec(),) * len(shapes)
    placed = tuple(
        jax.tree.map(
            lambda x, spec=spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(where, spec)
            ),
            shape,
        )
        for shape, spec in zip(shapes, specs, strict=True)
    )
    with jax.sharding.use_abstract_mesh(where.abstract_mesh), without_cache():
        compiled = jax.jit(function).lower(*placed).compile()
    return _described(compiled)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Nothing is written to the persistent cache: without the device it could not be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _described(compiled: Any) -> Compiled:
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), _text(compiled)
    seconds = cost.get("optimal_seconds", 0.0)
    return Compiled(
        text=text,
        vmem_bytes=_vmem_bytes(text),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        seconds=seconds if seconds > 0 else None,
    )


def _text(compiled: Any) -> str:
    """HLO; or the serialized program, where JAX cannot read back what libtpu writes (asynchronous
    calls to a TPU7x's sparse cores).
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return _SERIALIZED + compiled.runtime_executable().serialize().decode("utf-8", "replace")


def _vmem_bytes(text: str) -> tuple[int, ...]:
    """Scoped allocation of each kernel: memory space 1 is the vector memory."""
    found = []
    for kernel in re.split(r'"custom_call_config": ?\{"body"', text)[1:]:
        used = re.search(r'"used_scoped_memory_configs":\[([^\n]*?)\]', kernel)
        sizes = re.findall(
            r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used.group(1) if used else ""
        )
        found.append(sum(int(size) for size in sizes))
    if text.startswith(_SERIALIZED):  # it holds the program twice
        return tuple(found[: len(found) // 2])
    return tuple(found)
