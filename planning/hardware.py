"""One table of accelerators: what every estimate of the room stands on.

Figures are of one device as a cluster's user counts them (a TPU chip, a GPU, a die of an MI250X),
dense, in SI units, as the vendors publish them. `--hardware-json` of the commands adds a row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights import nearest

MIB = 2**20


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    bf16_flops, int8_ops, fp8_flops: operations/s of a matrix product; 0 where there is no faster
        unit for the type than that of bfloat16.
    memory_bytes, bandwidth: of its main memory; bytes and bytes/s.
    link_bandwidth: one way over one link to a neighbour, or into the switch; bytes/s.
    links: links of a device; those of a torus go both ways along each of its dimensions.
    torus: dimensions of the torus that devices form; 0 if they hang on a switch.
    domain: devices that the fast links join at most.
    network_bandwidth: one way, a device's share of its host's network; bytes/s.
    on_chip_bytes: vector memory, or the last cache.
    host_bandwidth: to the memory of its host; bytes/s.
    launch_seconds: host's time to start a program.
    latency_seconds: of one message between neighbours.
    """

    bf16_flops: float
    int8_ops: float
    fp8_flops: float
    memory_bytes: float
    bandwidth: float
    link_bandwidth: float
    links: int
    torus: int
    domain: int
    network_bandwidth: float
    on_chip_bytes: float
    host_bandwidth: float
    launch_seconds: float = 5e-6
    latency_seconds: float = 1e-6

    @property
    def turning_point(self) -> float:
        """FLOPs a byte above which a bfloat16 product is bound by the matrix unit."""
        return self.bf16_flops / self.bandwidth


HARDWARE: dict[str, Hardware] = {
    "tpu-v4": Hardware(275e12, 0, 0, 32e9, 1228e9, 50e9, 6, 3, 4096, 6.25e9, 32 * MIB, 16e9),
    "tpu-v5e": Hardware(197e12, 394e12, 0, 16e9, 819e9, 50e9, 4, 2, 256, 6.25e9, 128 * MIB, 16e9),
    "tpu-v5p": Hardware(
        459e12, 918e12, 0, 95e9, 2765e9, 100e9, 6, 3, 8960, 6.25e9, 128 * MIB, 32e9
    ),
    "tpu-v6e": Hardware(
        918e12, 1836e12, 918e12, 32e9, 1640e9, 112e9, 4, 2, 256, 12.5e9, 128 * MIB, 32e9
    ),
    "tpu-7x": Hardware(
        2307e12, 0, 4614e12, 192e9, 7380e9, 200e9, 6, 3, 9216, 12.5e9, 128 * MIB, 64e9
    ),
    "a100-40g": Hardware(312e12, 624e12, 0, 40e9, 1555e9, 300e9, 1, 0, 8, 25e9, 40 * MIB, 32e9),
    "a100-80g": Hardware(312e12, 624e12, 0, 80e9, 2039e9, 300e9, 1, 0, 8, 25e9, 40 * MIB, 32e9),
    "a6000": Hardware(154.8e12, 309.7e12, 0, 48e9, 768e9, 56e9, 1, 0, 2, 12.5e9, 6 * MIB, 32e9),
    "h100": Hardware(989e12, 1979e12, 1979e12, 80e9, 3350e9, 450e9, 1, 0, 8, 50e9, 50 * MIB, 64e9),
    "h200": Hardware(989e12, 1979e12, 1979e12, 141e9, 4800e9, 450e9, 1, 0, 8, 50e9, 50 * MIB, 64e9),
    "b200": Hardware(
        2250e12, 4500e12, 4500e12, 180e9, 7700e9, 900e9, 1, 0, 8, 50e9, 126 * MIB, 64e9
    ),
    "mi250x-gcd": Hardware(
        191.5e12, 191.5e12, 0, 64e9, 1600e9, 50e9, 4, 0, 8, 12.5e9, 8 * MIB, 36e9
    ),
    "mi300x": Hardware(
        1307e12, 2615e12, 2615e12, 192e9, 5300e9, 448e9, 1, 0, 8, 50e9, 256 * MIB, 64e9
    ),
    "cpu-2-cores": Hardware(0.42e12, 0, 0, 16e9, 30e9, 5e9, 1, 0, 1, 1e9, 32 * MIB, 15e9, 50e-6),
    "cpu-64-cores": Hardware(
        4e12, 8e12, 0, 512e9, 300e9, 20e9, 1, 0, 2, 12.5e9, 256 * MIB, 300e9, 50e-6
    ),
}
"""Name -> figures. TPU links are those between chips, NVIDIA's and AMD's those into
the switch or, on an MI250X die, across packages. Of the CPUs, the one of 2 cores is measured by
`benchmarks/planning_cpu.py` (twice its float32 rate stands for bfloat16), the other is a guess."""


def hardware(name: str, more: Mapping[str, Hardware] | None = None) -> Hardware:
    """The row of a name. Raises `ValueError` for an unknown one."""
    known = {**HARDWARE, **(more or {})}
    if name not in known:
        raise ValueError(
            f"hardware {name!r} is not in the table (near: {nearest(name, known)}); "
            f"there are {', '.join(known)}, and --hardware-json adds one"
        )
    return known[name]


def read_hardware(path: str | Path) -> dict[str, Hardware]:
    """Rows of a JSON file, `{name: {field: value}}`; `"like": NAME` takes the rest from another.

    Raises `ValueError` for a field that is unknown, missing or not above 0, naming file and row.
    """
    rows: dict[str, Hardware] = {}
    fields = {field.name: field for field in dataclasses.fields(Hardware)}
    for name, given in json.loads(Path(path).read_text()).items():
        values = dict(given)
        like = values.pop("like", None)
        for field in values:
            if field not in fields:
                raise ValueError(
                    f"{path}: {name}.{field} is unknown; near: {nearest(field, fields)}"
                )
            if not isinstance(values[field], int | float) or values[field] < 0:
                raise ValueError(f"{path}: {name}.{field} is {values[field]!r}; a number >= 0")
        if like is not None:
            rows[name] = dataclasses.replace(hardware(like, rows), **values)
            continue
        needed = [n for n, field in fields.items() if field.default is dataclasses.MISSING]
        if missing := [field for field in needed if field not in values]:
            raise ValueError(f'{path}: {name} lacks {", ".join(missing)} (or "like": a known name)')
        rows[name] = Hardware(**values)
    return rows
