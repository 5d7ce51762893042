"""What a kernel is chosen for: the device that the current trace compiles for; and the one warning
when the plain function takes its place.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax

from kernels_pallas.tpu_topology import generation_of


@dataclass(frozen=True)
class Target:
    """platform: "cpu", "tpu" or "gpu". device_kind: as `jax.Device.device_kind`. generation: a name
    in `tpu_topology.GENERATIONS`, or None.
    """

    platform: str
    device_kind: str
    generation: str | None


def current_target() -> Target:
    """The device of the mesh being traced in (a described one counts), else of `jax.jit`."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = _default_device()
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform, device.device_kind, generation_of(device.device_kind))


def _default_device() -> Any:
    chosen: Any = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


@functools.cache
def warn_once(operation: str, reason: str) -> None:
    """Say once a process that `operation` runs as its plain function, and why."""
    warnings.warn(
        f"{operation}: the plain function runs instead of a kernel: {reason}", stacklevel=3
    )
