"""Pictures of plans: operators under the roof, and what a compiled step needs of a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planning.hardware import Hardware
from planning.roofline import Timed, merged
from planning.show import GIB, memory_kinds, place

if TYPE_CHECKING:
    from planning.compile_ahead import Plan
    from planning.compile_serving import ServingPlan

MOST_EXCHANGES = 8


def draw_plan(path: str | Path, plan: Plan | ServingPlan, title: str) -> None:
    """Memory of a device by kind beside its limit, and what it sends in a step by collective."""
    pyplot = _pyplot()
    figure, (memory, network) = pyplot.subplots(
        2, 1, figsize=(8, 5), height_ratios=(1, 3), layout="constrained"
    )
    start = 0.0
    for kind, value in memory_kinds(plan).items():
        memory.barh(0, value / GIB, left=start / GIB, label=f"{kind} {value / GIB:.2f}")
        start += value
    memory.axvline(plan.limit / GIB, color="black")
    memory.set_xlim(0, 1.05 * max(plan.limit, plan.memory) / GIB)
    memory.set_yticks([])
    memory.set_xlabel(f"GiB of a device; the line is its limit, {plan.limit / GIB:.1f}")
    memory.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    sent: defaultdict[str, float] = defaultdict(float)
    for each in plan.collectives:
        sent[f"{each.kind} over {', '.join(each.axes) or '?'} ({each.dtype})"] += each.sent
    most = sorted(sent.items(), key=lambda item: item[1])[-MOST_EXCHANGES:]
    names, values = zip(*most or [("none", 0.0)], strict=True)
    network.barh(range(len(names)), [value / 1e9 for value in values], color="tab:gray")
    network.set_yticks(range(len(names)), names, fontsize=7)
    network.set_xlabel("GB that a device sends in a step")
    figure.suptitle(f"{title}\n{place(plan)}; limited by {plan.limited_by}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_roofline(path: str | Path, device: Hardware, title: str, found: Sequence[Timed]) -> None:
    """Operators under the roof of a device: FLOPs a byte against FLOP/s."""
    import numpy as np

    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    x = np.logspace(-1, 4, 200)
    axes.loglog(x, np.minimum(device.bf16_flops, x * device.bandwidth), color="black")
    for each in merged(found):
        reached = each.op.flops / each.seconds
        axes.plot(each.op.intensity, reached, "o", label=each.op.name, alpha=0.7)
    axes.axvline(device.turning_point, color="grey", linewidth=0.7, linestyle=":")
    axes.set_xlabel("FLOPs a byte")
    axes.set_ylabel("FLOP/s at most")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    """Matplotlib without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
