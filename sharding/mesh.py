"""The device mesh: six named axes, sized by a config, laid over the devices a run has.

Axes stand from the slowest link to the fastest: replicas of the model (`data`) may be far apart,
the pieces of one matrix (`tensor`) should be neighbours.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "expert", "stage", "context", "tensor")
"""Mesh axes in device order, the last one between nearest neighbours."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    data: replicas of the model that each take a part of the batch; -1 takes the devices left over.
    fsdp: devices that share one replica's weights and optimizer state and also split the batch.
    expert: devices that a mixture's experts are spread over; other layers split the batch.
    stage: pipeline stages, each with a part of the layers (`sharding.pipeline`).
    context: devices that one sequence is split over.
    tensor: devices that each matrix's heads, feed-forward columns and vocabulary are split over.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    stage: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        wrong = {axis: size for axis, size in sizes.items() if size != -1 and size < 1}
        if wrong:
            raise ValueError(f"mesh axes must be 1 or more, or -1 to fill: {show_sizes(wrong)}")
        fill = [axis for axis, size in sizes.items() if size == -1]
        if len(fill) > 1:
            raise ValueError(
                f"only one mesh axis may be -1, not {' and '.join(fill)}: set all but one of them"
            )

    def sizes(self, devices: int) -> dict[str, int]:
        """`{axis: size}` over a number of devices, with -1 filled in.

        Raises `ValueError` naming axes, sizes, devices and a mesh that would work if the product
        does not fit.
        """
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        filled = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
        if math.prod(filled.values()) != devices:
            raise ValueError(
                f"mesh {show_sizes(sizes)} does not fit {devices} devices (the product of its axes "
                f"must be {devices}); a mesh that would work: "
                f"{show_sizes(_fitting(sizes, devices))}"
            )
        return filled


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config over `devices` (default: those of all processes), axes `AXES` in order.

    On accelerators the device order follows the physical interconnect. Over several slices (TPU
    pods joined by a slower network) the outer axes span them as far as their sizes allow.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple((config or MeshConfig()).sizes(len(devices)).values())
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices in an array of these sizes (of `AXES`), neighbours along the inner axes."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = _across_slices(sizes, slices)
        within = tuple(size // outer for size, outer in zip(sizes, across, strict=True))
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(sizes)


def _across_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """How many slices each axis spans: those that send least go first over the slower network."""
    within = dict(zip(AXES, sizes, strict=True))
    across = {}
    for axis in ("data", "stage", "fsdp", "expert", "context", "tensor"):
        across[axis] = math.gcd(within[axis], slices)
        slices //= across[axis]
    if across["context"] * across["tensor"] > 1:
        logger.warning("context and tensor span slices: %s over the slow network", across)
    return tuple(across[axis] for axis in AXES)


def _fitting(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """A mesh that fits: inner axes keep what divides the devices, `data` takes the rest."""
    fitted, left = {}, devices
    for axis in reversed(AXES[1:]):
        fitted[axis] = math.gcd(sizes[axis], left) if sizes[axis] > 0 else 1
        left //= fitted[axis]
    return {"data": left, **{axis: fitted[axis] for axis in AXES[1:]}}


def show_sizes(sizes: Mapping[str, int]) -> str:
    """`data=2 tensor=4`, leaving out axes of size 1 unless all are."""
    shown = {axis: size for axis, size in sizes.items() if size != 1} or dict(sizes)
    return " ".join(f"{axis}={size}" for axis, size in shown.items())
