"""Tables of plans; `planning.plots` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from planning.inference import Report
from planning.operators import total_bytes, total_flops
from planning.roofline import Timed, merged, seconds
from sharding.mesh import AXES

if TYPE_CHECKING:
    from planning.clusters import Crossing
    from planning.compile_ahead import Plan
    from planning.compile_serving import ServingPlan
    from planning.hlo import Collective
    from planning.search import Candidate
    from planning.verify import Verified

GIB = 2**30
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float, unit: str = "") -> str:
    """`12.3 G`, with three digits."""
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(value: float) -> str:
    """Seconds as `1.23 ms`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def roofline_table(title: str, found: Sequence[Timed]) -> Table:
    """A row an operator, those of equal size put together, and the sum."""
    rows = [
        (
            each.op.name,
            str(each.op.count),
            quantity(each.op.flops),
            quantity(each.op.bytes, "B"),
            f"{each.op.intensity:.4g}",
            duration(each.seconds * each.op.count),
            each.bound,
        )
        for each in merged(found)
    ]
    ops = [each.op for each in found]
    flops, moved = total_flops(ops), total_bytes(ops)
    total = (quantity(flops), quantity(moved, "B"), f"{flops / moved:.4g}")
    rows.append(("all", "", *total, duration(seconds(found)), ""))
    columns = ("operator", "count", "FLOPs", "moved", "FLOPs/B", "time", "bound by")
    return table(title, columns, rows)


def report_table(title: str, reports: Sequence[tuple[str, Report]]) -> Table:
    """A row a plan."""
    rows = [
        (
            name,
            duration(each.ttft),
            duration(each.tpot),
            f"{each.tokens_per_second:,.0f}",
            f"{each.weights / GIB:.1f}",
            f"{each.cache / GIB:.1f}",
            "yes" if each.fits else "no",
            f"{each.prefill.bound} / {each.decode.bound}",
        )
        for name, each in reports
    ]
    columns = ("hardware", "first token", "each token", "tokens/s", "weights GiB", "cache GiB")
    return table(title, (*columns, "fits", "bound by (prefill / decode)"), rows)


def search_table(title: str, found: Sequence[Candidate]) -> Table:
    """A row a plan, the fastest first: sequences of a micro-batch, micro-batches, and seconds of a
    step, of sums that wait, of exchanges that hide behind computing, of the pipeline's idle time.
    """
    rows = []
    for each in found:
        axes = {axis: getattr(each.split, axis) for axis in AXES}
        named = [f"{axis}={size}" for axis, size in axes.items() if size > 1]
        rows.append(
            (
                " ".join([*named, each.schedule]).strip() or "1 device",
                str(each.micro_batch),
                str(each.accumulation),
                "yes" if each.remat else "no",
                f"{each.memory.total / GIB:.1f}",
                duration(each.time.seconds),
                duration(each.time.exposed),
                duration(each.time.hidden),
                duration(each.time.bubble),
                f"{each.utilization:.1%}",
            )
        )
    columns = ("mesh", "rows", "micro", "remat", "GiB", "step", "sums", "network", "bubble", "MFU")
    return table(title, columns, rows)


def verified_table(title: str, found: Sequence[Verified]) -> Table:
    """A row a plan: what was promised, and what compiling it showed."""
    rows = []
    for each in found:
        promised, plan = each.candidate, each.plan
        shown = (
            (each.why, "", "")
            if plan is None
            else (
                f"{plan.memory / GIB:.1f}",
                f"{plan.utilization(plan.serial_seconds):.1%}",
                f"{plan.utilization(plan.overlapped_seconds):.1%}",
            )
        )
        mesh = {axis: getattr(promised.split, axis) for axis in AXES}
        named = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
        predicted = (f"{promised.memory.total / GIB:.1f}", f"{promised.utilization:.1%}")
        rows.append((named or "1 device", *predicted, *shown, "yes" if each.fits else "no"))
    columns = ("mesh", "GiB promised", "MFU promised", "GiB", "MFU, no overlap", "all overlap")
    return table(title, (*columns, "fits"), rows)


def clusters_table(title: str, plans: Mapping[str, Crossing]) -> Table:
    """A row an axis that may cross the slow network: bytes over it in a step, activations and
    gradients; seconds of computing with layers by speed and with equal ones, and of the network.
    """
    rows = []
    for axis, each in plans.items():
        stages = [f"{n} {count}" for n, count in zip(each.clusters, each.layers, strict=False)]
        rows.append(
            (
                axis,
                ", ".join(stages) if each.stages > 1 else str(each.layers[0]),
                f"{each.micro_batches} {each.schedule}".strip(),
                quantity(each.messages, "B"),
                quantity(each.sums, "B"),
                duration(each.compute),
                duration(each.compute_equal),
                duration(each.network),
                f"{each.memory / GIB:.1f}",
            )
        )
    columns = ("crosses", "layers by speed", "micro", "messages", "gradients")
    return table(title, (*columns, "computing", "equal layers", "network", "GiB"), rows)


def plan_text(plan: Plan) -> list[Any]:
    """What to print of a compiled training step."""
    step = [
        ("computing, at the peak", duration(plan.compute_seconds)),
        ("network, one after another", duration(plan.network_seconds)),
        ("of which between slices", duration(plan.between_slices)),
        ("MFU if all overlaps", f"{plan.utilization(plan.overlapped_seconds):.1%}"),
        ("MFU if nothing overlaps", f"{plan.utilization(plan.serial_seconds):.1%}"),
        ("limited by", plan.limited_by),
    ]
    title = (
        f"{place(plan)}; {plan.tokens:,} tokens a step, {quantity(plan.flops)} FLOPs; "
        f"compiled in {plan.compile_seconds:.1f} s"
    )
    return [title, *_memory_and_network(plan), table("\na step", ("", ""), step)]


def serving_text(plan: ServingPlan) -> list[Any]:
    """What to print of a compiled step of the serving engine."""
    step = [
        ("operators, one after another", duration(plan.roofline_seconds)),
        ("network, one after another", duration(plan.network_seconds)),
        ("tokens/s if nothing overlaps", f"{plan.tokens / plan.seconds:,.0f}"),
        ("limited by", plan.limited_by),
    ]
    serving = plan.serving
    title = (
        f"{place(plan)}; {serving.what} of {plan.tokens:,} tokens, {serving.batch} sequences of "
        f"{serving.context:,} in the cache, weights {serving.weights}; "
        f"compiled in {plan.compile_seconds:.1f} s"
    )
    return [title, *_memory_and_network(plan), table("\na step", ("", ""), step)]


def memory_kinds(plan: Plan | ServingPlan) -> dict[str, float]:
    """Bytes of a device by kind."""
    names = {
        "parameters": "parameters",
        "optimizer": "optimizer state",
        "batch": "batch",
        "cache": "cache",
        "slots": "tokens and settings",
        "temporaries": "temporaries",
    }
    return {shown: getattr(plan, name) for name, shown in names.items() if hasattr(plan, name)}


def place(plan: Plan | ServingPlan) -> str:
    """The model's size, the slice and the mesh."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    name = f"{plan.topology.slices} x {plan.topology.name}"
    return f"{quantity(plan.parameter_count)} parameters on {name}, {mesh}"


def _memory_and_network(plan: Plan | ServingPlan) -> list[Table]:
    kinds = {**memory_kinds(plan), "all": plan.memory, "limit": plan.limit}
    memory = [
        (kind, f"{value / GIB:.3f}", f"{value / plan.limit:.1%}") for kind, value in kinds.items()
    ]
    columns = ("collective", "axes", "type", "devices", "array", "times", "sent by a device")
    return [
        table("\nmemory of a device", ("", "GiB", "of the limit"), memory),
        table(
            "\ncollectives of a step, most bytes first",
            columns,
            [_exchange(each) for each in plan.collectives[:20]],
        ),
    ]


def _exchange(each: Collective) -> tuple[str, ...]:
    return (
        each.kind,
        ", ".join(each.axes) or "?",
        each.dtype,
        str(each.devices),
        quantity(each.size, "B"),
        f"{each.count:,}",
        quantity(each.sent, "B"),
    )
