"""Compilation for Hopper GPUs that are not there, down to machine code.

JAX's CUDA plugin (`jax-cuda12-plugin` and `jax-cuda12-pjrt`, or those of CUDA 13) compiles for a
described GPU on any machine: XLA, Mosaic GPU and NVIDIA's assembler run, only the launch is left
out. So a test without a GPU holds that a kernel lowers, fits into shared memory and keeps its
values in registers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.tpu_topology import without_cache

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclass(frozen=True)
class Gpu:
    """One GPU. Figures are the vendor's.

    device_kind: as `jax.Device.device_kind`. processors: streaming multiprocessors. memory_bytes,
    bandwidth: memory, and bytes/s. bfloat16, int8: operations/s of a matrix product. shared_bytes:
    most shared memory of a thread block.
    """

    device_kind: str
    processors: int
    memory_bytes: int
    bandwidth: float
    bfloat16: float
    int8: float
    shared_bytes: int


GPUS: dict[str, Gpu] = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 84_978_434_048, 3.35e12, 989e12, 1979e12, 232_448),
    "h200": Gpu("NVIDIA H200", 132, 150_000_000_000, 4.8e12, 989e12, 1979e12, 232_448),
}
"""Name -> figures."""

DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {processors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: {shared_bytes}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{device_kind}"
"""


def gpu_of(device_kind: str) -> str | None:
    """Name in `GPUS` of a `jax.Device.device_kind`; None if it is another."""
    return next(
        (name for name, gpu in GPUS.items() if device_kind.startswith(gpu.device_kind)), None
    )


def why_not() -> str | None:
    """Why nothing can be compiled for a GPU here; None if it can."""
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        return "JAX's CUDA plugin is not installed (pip install jax-cuda12-plugin jax-cuda12-pjrt)"
    return None


def described_mesh(name: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of GPUs that need not exist, of one or as `axes` (name -> size) says."""
    from jax.experimental import topologies

    axes = dict(axes or {"device": 1})
    count = int(np.prod(list(axes.values())))
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=DESCRIPTION.format(**vars(GPUS[name])),
        topology=f"1x1x{count}",
    )
    devices = np.asarray(described.devices).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@dataclass(frozen=True)
class Compiled:
    """What the compilers say of a program.

    text: as HLO. registers, spilled_bytes: of each Mosaic kernel, in the order of compilation.
    argument_bytes, temp_bytes: memory of the program.
    """

    text: str
    registers: tuple[int, ...]
    spilled_bytes: tuple[int, ...]
    argument_bytes: int
    temp_bytes: int


def compile_for(
    function: Callable[..., Any],
    shapes: Any,
    name: str,
    *,
    specs: Any = None,
    mesh: Mesh | None = None,
) -> Compiled:
    """Compile `function(*shapes)` for a GPU; neither a GPU nor arrays are needed.

    Args:
        function: traceable; jitted here, and traced inside the described mesh.
        shapes: tuple of pytrees of arrays or `jax.ShapeDtypeStruct`.
        name: in `GPUS`.
        specs: `PartitionSpec`s, one an argument; None replicates.
        mesh: one made by `described_mesh` already, for a function that holds it (`jax.shard_map`).

    Raises whatever the compilers raise, unchanged.
    """
    where = described_mesh(name) if mesh is None else mesh
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
    fresh = jax.jit(lambda *arguments: function(*arguments))  # no cached program: its report counts
    inside = jax.sharding.use_abstract_mesh(where.abstract_mesh)
    with inside, without_cache(), _assembler_report() as report:
        compiled: Any = fresh.lower(*placed).compile()
    memory, said = compiled.memory_analysis(), report()
    return Compiled(
        compiled.as_text(),
        tuple(int(x) for x in re.findall(r"Used (\d+) registers", said)),
        tuple(int(x) for x in re.findall(r"(\d+) bytes spill stores", said)),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )


@contextlib.contextmanager
def _assembler_report() -> Iterator[Callable[[], str]]:
    """What the assembler says of each kernel; native code prints it to standard output."""
    before = os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        said: list[str] = []
        try:
            yield lambda: said[0]
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            said.append(text())
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
            else:
                os.environ["MOSAIC_GPU_DUMP_PTXAS"] = before
