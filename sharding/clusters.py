"""Several clusters as one machine: which device stands where in the mesh, so that only pipeline
stages reach from one cluster to another (Holmes, arXiv 2312.03549).

Between clusters the network is slow, and their devices or networks may be of different kinds. What
passes between stages is small and need not be summed, so `stage` goes over that network, and every
other group of devices lies inside one cluster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.mesh import AXES, MeshConfig, arrange, show_sizes

STAGE_AXIS = AXES.index("stage")
INNER = ("context", "tensor")
"""Axes whose groups lie inside one host."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts joined by one network.

    name: what it is called.
    hosts: how many; processes number on from the cluster before.
    link: one-way bandwidth of a host inside the cluster, bytes/s; 0 where the chips themselves are
        joined, as those of a TPU slice are.
    speed: layers a second of a device, in any unit that is the same for all clusters.
    processes: numbers of its processes, where they do not number on: (0, 2, 4).
    """

    name: str
    hosts: int
    link: float = 0.0
    speed: float = 1.0
    processes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("hosts", "speed"):
            if getattr(self, field) <= 0:
                raise ValueError(
                    f"cluster {self.name!r}: {field}={getattr(self, field)}; above 0 is right"
                )
        if self.link < 0:
            raise ValueError(f"cluster {self.name!r}: link={self.link} bytes/s; 0 or more is right")
        if self.processes and len(set(self.processes)) != self.hosts:
            raise ValueError(
                f"cluster {self.name!r}: {len(set(self.processes))} processes {self.processes} for "
                f"hosts={self.hosts}"
            )


def slices(devices: Sequence[Any]) -> tuple[Cluster, ...]:
    """TPU slices as clusters, in the order of their numbers."""
    found: dict[int, set[int]] = {}
    for device in devices:
        found.setdefault(device.slice_index, set()).add(device.process_index)
    return tuple(
        Cluster(f"slice {index}", len(found[index]), processes=tuple(sorted(found[index])))
        for index in sorted(found)
    )


def place(
    devices: Sequence[Any],
    clusters: Sequence[Cluster],
    axes: Mapping[str, int],
    host: Callable[[Any], int] = lambda device: device.process_index,
) -> np.ndarray:
    """Devices by their place in the mesh, `[data, fsdp, expert, stage, context, tensor]`.

    Stages follow the order of the clusters, each inside one; so no group of another axis reaches
    from one cluster to another. Groups of `context` and `tensor` lie inside one host, or in a
    cluster without `link` near each other.

    Args:
        devices: all of them.
        clusters: where they stand.
        axes: sizes of mesh axes; those left out are 1.
        host: the number of a device's host.

    Raises:
        ValueError: if clusters and devices do not match, or sizes cannot be laid so; it says which
            would work.
    """
    sizes = {axis: axes.get(axis, 1) for axis in AXES}
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(f"no mesh axis {unknown[0]!r}; there are {', '.join(AXES)}")
    grouped = _by_cluster(devices, clusters, host)
    _check_sizes(sizes, {name: len(group) for name, group in grouped.items()})
    in_stage = len(devices) // sizes["stage"]
    blocks = []
    for cluster in clusters:
        group = grouped[cluster.name]
        if cluster.link:
            _check_hosts(cluster, sizes, [host(device) for device in group])
        here = {**sizes, "stage": len(group) // in_stage}
        blocks.append(arrange(tuple(here.values()), group))
    return np.concatenate(blocks, axis=STAGE_AXIS)


def stage_clusters(stages: int, devices: Mapping[str, int]) -> tuple[str, ...]:
    """The cluster of each stage. devices: of each cluster by its name, in order."""
    in_stage = sum(devices.values()) // stages
    return tuple(name for name, count in devices.items() for _ in range(count // in_stage))


def cluster_mesh(config: MeshConfig, clusters: Sequence[Cluster], devices: Sequence[Any]) -> Mesh:
    """The mesh of a config over several clusters; as `make_mesh`, but laid by `place`."""
    placed = place(devices, clusters, config.sizes(len(devices)))
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_cluster(
    devices: Sequence[Any], clusters: Sequence[Cluster], host: Callable[[Any], int]
) -> dict[str, list[Any]]:
    """Devices of each cluster, those of a host side by side."""
    names = [cluster.name for cluster in clusters]
    if len(set(names)) != len(names):
        raise ValueError(f"clusters {', '.join(names)}: each needs a name of its own")
    hosts, owner, following = sorted({host(device) for device in devices}), {}, 0
    for cluster in clusters:
        numbers = cluster.processes or range(following, following + cluster.hosts)
        following = max(numbers) + 1
        for number in numbers:
            if number in owner:
                raise ValueError(f"host {number} is in clusters {owner[number]} and {cluster.name}")
            owner[number] = cluster.name
    if sorted(owner) != hosts:
        raise ValueError(
            f"clusters name {len(owner)} hosts ({_listed(sorted(owner))}), there are "
            f"{len(hosts)} ({_listed(hosts)})"
        )
    grouped: dict[str, list[Any]] = {name: [] for name in names}
    for device in sorted(devices, key=lambda device: (host(device), device.id)):
        grouped[owner[host(device)]].append(device)
    return grouped


def _check_sizes(sizes: Mapping[str, int], counts: Mapping[str, int]) -> None:
    """Raise `ValueError` if stages do not lie inside clusters."""
    total = sum(counts.values())
    shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
    if math.prod(sizes.values()) != total:
        raise ValueError(
            f"mesh {show_sizes(sizes)} is {math.prod(sizes.values())} devices; {shown}, {total} in "
            "all"
        )
    most = math.gcd(*counts.values())
    in_stage = total // sizes["stage"]
    if most % in_stage:
        right = [total // size for size in range(most, 0, -1) if most % size == 0]
        raise ValueError(
            f"stage={sizes['stage']} makes stages of {in_stage} devices, which reach over a "
            f"cluster's edge ({shown}): a stage may have {_listed(_divisors(most))} devices, so "
            f"use stage={_listed(right)} with data x fsdp x expert x context x tensor = "
            f"{total} / stage"
        )


def _check_hosts(cluster: Cluster, sizes: Mapping[str, int], hosts: Sequence[int]) -> None:
    """Raise `ValueError` if groups of `context` and `tensor` reach from host to host."""
    inner = math.prod(sizes[axis] for axis in INNER)
    least = math.gcd(*(hosts.count(number) for number in set(hosts)))
    if least % inner:
        raise ValueError(
            f"cluster {cluster.name!r}: context x tensor = {inner} does not divide the {least} "
            f"devices of a host, so a group would reach from host to host; use "
            f"{_listed(_divisors(least))}"
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) < 9 else [*shown[:4], "…", *shown[-2:]])
