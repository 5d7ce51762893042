"""Closed forms for the time of a collective: rings, tori, and levels of unequal bandwidth.

Everywhere `devices` is how many take part, `size` the bytes of the whole (gathered) array, `link`
the one-way bandwidth that each device has towards the next in bytes/s, `latency` seconds a message.
A ring that runs both ways, or several axes of a torus at once, is that many links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planning.hardware import Hardware


@dataclass(frozen=True)
class Level:
    """Devices joined by one kind of link: how many, bytes/s one way of each, seconds a message."""

    devices: int
    link: float
    latency: float = 1e-6


def all_gather(devices: int, size: float, link: float, latency: float = 1e-6) -> float:
    """Seconds; each device ends with all of `size`: (n - 1) (latency + size / (n link))."""
    return (devices - 1) * (latency + size / (devices * link))


def reduce_scatter(devices: int, size: float, link: float, latency: float = 1e-6) -> float:
    """Seconds; each device ends with the sum of its part: those of an all-gather."""
    return all_gather(devices, size, link, latency)


def all_reduce(devices: int, size: float, link: float, latency: float = 1e-6) -> float:
    """Seconds; a reduce-scatter and an all-gather."""
    return 2 * all_gather(devices, size, link, latency)


def all_to_all(devices: int, size: float, link: float, latency: float = 1e-6) -> float:
    """Seconds; `size` is what each device holds, and every pair has a full-speed path."""
    return (devices - 1) * (latency + size / (devices * link))


def send(size: float, link: float, latency: float = 1e-6) -> float:
    """Seconds to the next device."""
    return latency + size / link


COLLECTIVES: dict[str, Callable[[int, float, float, float], float]] = {
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_reduce": all_reduce,
    "all_to_all": all_to_all,
}
"""Name -> `seconds(devices, size, link, latency)`."""


def hierarchical(kind: str, levels: Sequence[Level], size: float) -> float:
    """Seconds of an all-reduce, reduce-scatter or all-gather over levels, the innermost first.

    What leaves a level is the part that each of its devices is left with, so the slow outer links
    carry `size / (devices within)` (hierarchical reduction; NCCL's trees, Frontier's two levels).
    """
    if kind not in ("all_reduce", "reduce_scatter", "all_gather"):
        raise ValueError(
            f"{kind!r} has no hierarchical form; all_reduce, reduce_scatter, all_gather"
        )
    seconds = 0.0
    for level in levels:
        seconds += COLLECTIVES[kind](level.devices, size, level.link, level.latency)
        size /= level.devices
    return seconds


def ring_bandwidth(hardware: Hardware, axes: int = 1) -> float:
    """One-way bytes/s of a device in a collective over `axes` axes of its torus, run both ways."""
    if hardware.torus:
        return 2 * hardware.link_bandwidth * min(axes, hardware.torus)
    return hardware.link_bandwidth * hardware.links
