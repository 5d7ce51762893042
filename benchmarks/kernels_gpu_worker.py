"""The process behind `kernels_gpu.py` that has the GPU: it is told on stdin which cases to run, and
appends a line of JSON to a file for each. A kernel that hangs or breaks the device takes this
process with it, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NO_GPU = 2
"""Exit status."""
BROKEN = 4
"""Exit status after a failure that the device has not survived; the row is written."""
NOT_INSTALLED = "not installed"
TARGETS = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")
"""Names of custom calls that are kernels of Pallas, of its two back ends."""


@dataclass(frozen=True)
class Order:
    """What to do.

    names: of cases, in this order; "ceilings" measures those. rows: the file. seconds: after which
    nothing new is begun. dry_run: no GPU; `device` of `gpu_topology.GPUS` is compiled for.
    ceilings: as measured before.
    """

    names: list[str]
    rows: str
    seconds: float
    dry_run: bool = False
    device: str = "h100"
    ceilings: dict[str, float] = field(default_factory=dict)


@dataclass
class Row:
    """What became of a case; a later line of the same name takes the place of an earlier one.

    state: "right", "wrong", "failed", "no GPU kernel" or "out of time"; of the ceilings "measured".
    apart: of each result; None is not finite. tolerance: of each. compiled: what compilers said
    without a GPU. share: of the ceiling. rivals: name -> seconds, or why there are none. met: the
    goal, None without one. facts: ceilings and versions. took: seconds for all of it. done: False
    while rivals are still being timed.
    """

    name: str
    state: str = "failed"
    error: str = ""
    apart: list[float | None] = field(default_factory=list)
    tolerance: list[float] = field(default_factory=list)
    compiled: str = ""
    seconds: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""
    share: float | None = None
    goal: str = ""
    met: bool | None = None
    rivals: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    took: float = 0.0
    done: bool = True


def main() -> int:
    """Obey the order on stdin."""
    order, began = Order(**json.load(sys.stdin)), time.perf_counter()
    import jax

    if not order.dry_run and jax.default_backend() != "gpu":
        print(f"JAX has no GPU here, but {jax.default_backend()}", file=sys.stderr)
        return NO_GPU
    from benchmarks.kernels_gpu import cases_by_name

    cases, tiny = cases_by_name(), cases_by_name(tiny=True) if order.dry_run else {}
    deadline, found = began + order.seconds, dict(order.ceilings)
    for name in order.names:
        if time.perf_counter() > deadline:
            return 0
        row, started = Row(name), time.perf_counter()
        work: Callable[[], None]
        if name == "ceilings":
            work = lambda row=row: measure_ceilings(row, found)  # noqa: E731
        elif order.dry_run:
            work = lambda row=row: rehearse(row, cases[row.name], tiny[row.name], order.device)  # noqa: E731
        else:
            work = lambda row=row: run(row, cases[row.name], found, deadline, order.rows)  # noqa: E731
        survived = attempt(row, work)
        row.took = time.perf_counter() - started
        write(order.rows, row)
        if not survived:
            return BROKEN
    return 0


def attempt(row: Row, work: Callable[[], None]) -> bool:
    """Do it, or leave the error in the row; whether the device can go on after it."""
    import jax
    import jax.numpy as jnp

    try:
        work()
    except Exception as error:
        row.state, row.error = "failed", in_a_line(error)
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except Exception:
        return False
    return True


def in_a_line(error: BaseException) -> str:
    """The first lines of an error, as one."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def write(path: str, row: Row) -> None:
    """Append a line, whole and at once."""
    line = json.dumps(dataclasses.asdict(row)) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def measure_ceilings(row: Row, found: dict[str, float]) -> None:
    """Into the row and into `found`."""
    import jax

    from benchmarks import gpu_measure

    found.update(gpu_measure.ceilings())
    device: Any = jax.local_devices()[0]
    version = getattr(device.client, "platform_version", "")
    row.state = "measured"
    row.facts = {"ceilings": dict(found), "device": device.device_kind, "jax": jax.__version__}
    row.facts["cuda"] = " ".join(version.split())


def judge(row: Row, case: Any, found: Any, expected: Any) -> None:
    """Compare; the state and the differences go into the row."""
    from benchmarks.gpu_measure import apart

    differences = apart(found, expected)
    allowed = case.tolerance
    row.tolerance = [allowed] * len(differences) if isinstance(allowed, float) else list(allowed)
    right = all(x <= y for x, y in zip(differences, row.tolerance, strict=True))
    row.state = "right" if right else "wrong"
    row.apart = [x if math.isfinite(x) else None for x in differences]


def run(row: Row, case: Any, found: dict[str, float], deadline: float, path: str) -> None:
    """Check the kernel, then time it and its rivals."""
    import jax

    if not case.served:
        row.state = "no GPU kernel"
        return
    make = jax.jit(case.make)
    arguments = make(jax.random.key(0))
    expected = jax.jit(case.exact)(*arguments)
    judge(row, case, jax.jit(case.kernel)(*case.poisoned(arguments)), expected)
    del expected
    if case.speed is None:
        return
    from benchmarks import gpu_measure

    speed = case.speed
    count = gpu_measure.copies_for(speed.bytes) if speed.ceiling == "copy" else 1
    copies = [arguments, *(make(jax.random.key(i)) for i in range(1, count))]
    taken = gpu_measure.seconds(case.kernel, copies)
    if speed.less is not None:
        taken -= gpu_measure.seconds(speed.less, copies)
    note_speed(row, speed, taken, found)
    note_goal(row, speed)
    for rival in speed.rivals:
        write(path, dataclasses.replace(row, done=False))  # kept, should it break the device
        row.rivals[rival.name] = (
            rival_seconds(rival, copies) if time.perf_counter() < deadline else "out of time"
        )
    note_goal(row, speed)


def note_speed(row: Row, speed: Any, taken: float, found: dict[str, float]) -> None:
    """Time and share of the ceiling."""
    if taken <= 0:
        raise ValueError(f"it took {taken:.2e} s beyond what is taken off: too noisy to measure")
    row.seconds, row.flops, row.bytes, row.ceiling = taken, speed.flops, speed.bytes, speed.ceiling
    done = speed.bytes if speed.ceiling == "copy" else speed.flops
    if speed.ceiling in found:
        row.share = done / taken / found[speed.ceiling]


def note_goal(row: Row, speed: Any) -> None:
    """Whether it is met, as far as that is known."""
    if speed.goal is not None:
        row.goal = f">= {speed.goal:.0%} of {speed.ceiling}"
        row.met = None if row.share is None else row.share >= speed.goal
    if speed.beside is not None:
        name, factor = speed.beside
        other = row.rivals.get(name)
        row.goal = f">= {factor} x {name}"
        if isinstance(other, float) and row.seconds:
            row.met = other / row.seconds >= factor


def rival_seconds(rival: Any, copies: list[Any]) -> float | str:
    """Its time, or why there is none."""
    import jax

    from benchmarks import gpu_measure

    try:
        if rival.prepare is not None:
            prepare = jax.jit(rival.prepare)
            copies = [prepare(*arguments) for arguments in copies]
        measure = gpu_measure.torch_seconds if rival.torch else gpu_measure.seconds
        taken = measure(rival.function, copies)
        return taken - (measure(rival.less, copies) if rival.less is not None else 0.0)
    except ImportError:
        return NOT_INSTALLED
    except Exception as error:
        return in_a_line(error)


def rehearse(row: Row, case: Any, tiny: Any, device: str) -> None:
    """Without a GPU: the plain function in the kernel's types at a tiny size must be within the
    tolerance, and the kernel must compile at its own size.
    """
    import jax

    arguments = jax.jit(tiny.make)(jax.random.key(0))
    jax.block_until_ready(tiny.poisoned(arguments))
    judge(row, tiny, jax.jit(tiny.plain)(*arguments), jax.jit(tiny.exact)(*arguments))
    if row.state == "wrong":
        return
    if not case.served:
        row.state = "no GPU kernel"
        return
    shapes = jax.eval_shape(case.make, jax.eval_shape(jax.random.key, 0))
    row.compiled = compiled(case.kernel, shapes, device)


def compiled(function: Callable[..., Any], shapes: Any, device: str) -> str:
    """What is known of a kernel that cannot run: registers and spills of its machine code, or,
    without JAX's CUDA plugin, that it lowers.
    """
    from kernels_pallas import gpu_topology

    if gpu_topology.why_not() is None:
        made = gpu_topology.compile_for(function, shapes, device)
        if not made.registers:  # Triton's, which has no report, or one that was compiled before
            count = sum(made.text.count(f'custom_call_target="{name}"') for name in TARGETS)
            return f"compiles, {count} kernels" if count else "compiles, by XLA alone"
        spilled = sum(made.spilled_bytes)
        return f"{max(made.registers)} registers" + (f", {spilled} B spilled" if spilled else "")
    return lowered(function, shapes, gpu_topology.GPUS[device].device_kind)


def lowered(function: Callable[..., Any], shapes: Any, device_kind: str) -> str:
    """Traced for a GPU that only has a name, and exported for CUDA."""
    import jax
    from jax import export

    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in TARGETS]
    with jax.sharding.use_abstract_mesh(named_gpu(device_kind)):
        fresh = jax.jit(lambda *arguments: function(*arguments))
        made = export.export(fresh, platforms=["cuda"], disabled_checks=unchecked)(*shapes)
    module = made.mlir_module()
    return f"lowers, {sum(module.count(f'custom_call @{name}(') for name in TARGETS)} kernels"


def named_gpu(device_kind: str) -> Any:
    """A mesh of one GPU that there is no more of than its name; enough to trace for it."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    device = AbstractDevice(device_kind, None, "cuda")
    return AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)


if __name__ == "__main__":
    raise SystemExit(main())
