"""How long a pass takes at least: each operator bound by the matrix unit or by memory (the roofline
of LLM-Viewer, arXiv 2402.16363, with its faults mended; see docs/planning.md).

Times are lower bounds: perfect overlap inside an operator, none between operators, and no time for
norms, launches or the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from planning.hardware import Hardware
from planning.operators import Bits, Op


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that real programs reach; 1 is the roofline itself."""

    compute: float = 1.0
    memory: float = 1.0
    network: float = 1.0

    def __post_init__(self) -> None:
        for field in ("compute", "memory", "network"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"efficiency.{field}={getattr(self, field)}; above 0, at most 1")


@dataclass(frozen=True)
class Timed:
    """An operator with its times in seconds, of one of its `op.count` runs."""

    op: Op
    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        """The longer of both."""
        return max(self.compute, self.memory)

    @property
    def bound(self) -> str:
        """What bounds it."""
        return "compute" if self.compute >= self.memory else "memory"


def peak_flops(device: Hardware, bits: Bits) -> float:
    """Operations/s: the 8-bit unit's only when weights, activations and cache are all of 8 bits."""
    if max(bits.weights, bits.activations, bits.cache) <= 8 and device.int8_ops:
        return device.int8_ops
    return device.bf16_flops / (2 if bits.activations > 16 else 1)


def timed(
    ops: Sequence[Op],
    device: Hardware,
    bits: Bits | None = None,
    efficiency: Efficiency | None = None,
) -> list[Timed]:
    """Each operator's times on a device."""
    efficiency, bits = efficiency or Efficiency(), bits or Bits()
    flops, bandwidth = peak_flops(device, bits), device.bandwidth
    return [
        Timed(
            op,
            op.flops / (flops * efficiency.compute),
            op.bytes / (bandwidth * efficiency.memory),
        )
        for op in ops
    ]


def seconds(found: Sequence[Timed]) -> float:
    """Seconds of the whole pass."""
    return sum(each.seconds * each.op.count for each in found)


def merged(found: Sequence[Timed]) -> list[Timed]:
    """Equal operators of different segments put together, in the order of the first."""
    counts: dict[Timed, int] = {}
    for each in found:
        single = dataclasses.replace(each, op=dataclasses.replace(each.op, count=1))
        counts[single] = counts.get(single, 0) + each.op.count
    return [
        dataclasses.replace(each, op=dataclasses.replace(each.op, count=count))
        for each, count in counts.items()
    ]


def compute_bound_batch(device: Hardware, bits: Bits | None = None) -> float:
    """Tokens at once from which a linear layer is bound by the matrix unit: peak w / (2 bandwidth),
    w bytes a weight.
    """
    bits = bits or Bits()
    return peak_flops(device, bits) * (bits.weights / 8) / (2 * device.bandwidth)
