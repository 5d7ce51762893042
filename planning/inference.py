"""Latency, throughput, memory and energy of serving a model on given hardware, and the least
hardware that meets given limits: the analytical model of GenZ (arXiv 2406.01698), with the faults
of its code mended (docs/planning.md lists them).

An operator takes the longest of its computing, its memory traffic and its collective; operators
follow one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model import ModelConfig
from planning.collectives import all_reduce, ring_bandwidth
from planning.hardware import Hardware
from planning.memory import inference_memory
from planning.operators import Bits, Op, Work, decode, operators
from planning.roofline import Efficiency, peak_flops

COLLECTIVE_START_S = 5e-6
POWER_SHARES = {"static": 0.30, "compute": 0.40, "memory": 0.20, "network": 0.10}


@dataclass(frozen=True)
class UseCase:
    """What is served: prompts of `prompt` tokens, `output` tokens each, `batch` sequences at once.

    shared_prefix: tokens of the prompt whose keys and values are cached already. ttft_limit,
    tpot_limit: seconds to the first token and between tokens; None is no limit.
    """

    prompt: int
    output: int
    batch: int = 1
    shared_prefix: int = 0
    ttft_limit: float | None = None
    tpot_limit: float | None = None

    def __post_init__(self) -> None:
        if min(self.prompt, self.output, self.batch) < 1:
            raise ValueError("prompt, output and batch are at least 1")
        if not 0 <= self.shared_prefix < self.prompt:
            raise ValueError(f"shared_prefix={self.shared_prefix}; 0 to {self.prompt - 1}")


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward pass, and of what would bind it alone."""

    seconds: float
    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Report:
    """What serving a use case comes to.

    ttft, tpot: seconds to the first token and for each further one, at the mean context.
    tokens_per_second: of all sequences, while decoding. memory: bytes on a device, of which
    `weights` and `cache`. fits: in the device's memory. energy: joules a generated token, as a
    share of `watts` of all devices; 0 without them.
    """

    prefill: Pass
    decode: Pass
    ttft: float
    tpot: float
    tokens_per_second: float
    weights: float
    cache: float
    fits: bool
    energy: float

    @property
    def memory(self) -> float:
        """Bytes on a device."""
        return self.weights + self.cache

    def meets(self, case: UseCase) -> bool:
        """Whether it fits and keeps the limits."""
        slow = case.ttft_limit is not None and self.ttft > case.ttft_limit
        slow |= case.tpot_limit is not None and self.tpot > case.tpot_limit
        return self.fits and not slow


@dataclass(frozen=True)
class Plan:
    """Hardware as it is used: `tensor` devices, efficiencies, watts of a device at full load.

    on_chip: bytes/s at which a decode step's activations, which stay on the chip, are read; None
    counts them as memory traffic.
    """

    hardware: Hardware
    tensor: int = 1
    efficiency: Efficiency = Efficiency()
    bits: Bits = Bits()
    watts: float = 0.0
    on_chip: float | None = None


def time_pass(ops: Sequence[Op], plan: Plan, *, stays_on_chip: bool = False) -> Pass:
    """Seconds of the operators one after another."""
    device, share = plan.hardware, plan.efficiency
    peak = peak_flops(device, plan.bits) * share.compute
    total = compute = memory = network = 0.0
    link = ring_bandwidth(device) * share.network
    for op in ops:
        apart = op.activation_read + op.activation_write if stays_on_chip and plan.on_chip else 0.0
        computing = op.flops / peak
        moving = (op.bytes - apart) / device.bandwidth
        moving = (moving + apart / (plan.on_chip or 1.0)) / share.memory
        summing = 0.0
        if op.reduced:
            summing = COLLECTIVE_START_S
            summing += all_reduce(plan.tensor, op.reduced, link, device.latency_seconds)
        compute += computing * op.count
        memory += moving * op.count
        network += summing * op.count
        total += (max(computing, moving) + summing) * op.count
    return Pass(total, compute, memory, network)


def estimate(config: ModelConfig, case: UseCase, plan: Plan) -> Report:
    """What a use case takes on a plan's hardware. Raises `ValueError` where `tensor` is more
    devices than the hardware's fast links join.
    """
    if plan.tensor > plan.hardware.domain:
        raise ValueError(
            f"tensor={plan.tensor}; the fast links of this hardware join {plan.hardware.domain}"
        )
    new = case.prompt - case.shared_prefix
    prompt = Work(case.batch, new, case.prompt)
    context = case.prompt + max(case.output // 2, 1)
    first = time_pass(operators(config, prompt, plan.bits, plan.tensor), plan)
    each = time_pass(
        operators(config, decode(case.batch, context), plan.bits, plan.tensor),
        plan,
        stays_on_chip=True,
    )
    length = case.prompt + case.output
    weights, cache = inference_memory(config, case.batch, length, plan.bits, plan.tensor)
    return Report(
        prefill=first,
        decode=each,
        ttft=first.seconds,
        tpot=each.seconds,
        tokens_per_second=case.batch / each.seconds,
        weights=weights,
        cache=cache,
        fits=weights + cache <= plan.hardware.memory_bytes,
        energy=_joules(each, plan) / case.batch,
    )


def best_batch(config: ModelConfig, case: UseCase, plan: Plan, most: int = 4096) -> int:
    """The largest batch, of powers of two and their sums, that fits and keeps the limits; 0 if not
    even one sequence does.
    """

    def ok(batch: int) -> bool:
        return estimate(config, dataclasses.replace(case, batch=batch), plan).meets(case)

    batch, step = 0, 1
    while step <= most and ok(step):
        batch, step = step, step * 2
    step = batch // 2
    while step:
        if batch + step <= most and ok(batch + step):
            batch += step
        step //= 2
    return batch


def requirements(config: ModelConfig, case: UseCase, plan: Plan) -> tuple[Hardware, str]:
    """The least FLOP/s, bandwidth and memory with which `plan.tensor` such devices meet the limits,
    and the name of that which must grow most over `plan.hardware` (or shrink least).

    Raises `ValueError` if a limit is missing, or if messages alone take longer than one allows.
    """
    if case.ttft_limit is None or case.tpot_limit is None:
        raise ValueError("requirements need ttft_limit and tpot_limit")
    report = estimate(config, case, plan)
    found = dataclasses.replace(plan.hardware, memory_bytes=report.memory)
    for _ in range(3):  # each depends on the other where one pass is bound by both
        for field, limit, kind in (
            ("bandwidth", case.tpot_limit, "tpot"),
            ("bf16_flops", case.ttft_limit, "ttft"),
        ):

            def late(value: float, field: str = field, kind: str = kind) -> float:
                device = dataclasses.replace(found, **{field: value})
                return getattr(
                    estimate(config, case, dataclasses.replace(plan, hardware=device)), kind
                )

            found = dataclasses.replace(found, **{field: _least(late, limit, kind)})
    grown = {
        field: getattr(found, field) / getattr(plan.hardware, field)
        for field in ("bf16_flops", "bandwidth", "memory_bytes")
    }
    return found, max(grown, key=lambda field: grown[field])


def _least(late: Callable[[float], float], limit: float, kind: str) -> float:
    """The smallest value whose latency is within the limit, by bisection over its logarithm."""
    low, high = 1e6, 1e21
    if late(high) > limit:
        raise ValueError(f"{kind}_limit={limit} s cannot be met: the rest alone takes longer")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if late(middle) <= limit else (middle, high)
    return high


def _joules(each: Pass, plan: Plan) -> float:
    used = {"compute": each.compute, "memory": each.memory, "network": each.network}
    share = POWER_SHARES["static"] * each.seconds
    share += sum(POWER_SHARES[name] * min(value, each.seconds) for name, value in used.items())
    return share * plan.watts * plan.tensor
