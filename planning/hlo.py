"""The collectives of a compiled program, read from its text, with how often loops run them.

XLA's own analysis counts a loop's body once; here every computation is counted as often as it is
called, trip counts of loops included. What travels between slices of a TPU pod is told apart.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

REDUCERS = ("all-reduce", "reduce", "scatter", "sort", "select-and-scatter", "map")
"""Instructions whose `to_apply` joins two values."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_FUSED = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([a-z\-]+)')
_MADE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ((?:tuple|copy|constant)\(.*)$")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]*)\]\))? \{([^}]*)\}")
_PART = re.compile(r"('[^']*')(?::\((\d+)\)(\d+))?")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclass(frozen=True)
class Collective:
    """One kind of exchange.

    kind: "all_gather", "all_reduce", "reduce_scatter", "all_to_all", "permute" or "between_slices".
    dtype: of its elements. size: bytes of the whole array on each device, gathered or not yet
    scattered. devices: that take part together. axes: of the mesh that they vary along; empty where
    that cannot be told. count: times in one run of the program. part_of: the exchange that a
    "between_slices" belongs to, by its kind; empty where the compiler does not say.
    """

    kind: str
    dtype: str
    size: float
    devices: int
    axes: tuple[str, ...]
    count: int
    part_of: str = ""

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all its runs, by a ring."""
        share = (self.devices - 1) / self.devices if self.devices > 1 else 0.0
        factor = {"all_reduce": 2 * share, "permute": 1.0, "between_slices": 1.0}
        return self.size * self.count * factor.get(self.kind, share)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All of a program, most bytes first; equal ones put together.

    text: optimized HLO (`compiled.as_text()`). mesh: axis -> size, in device order.

    Raises `ValueError` for a text that has no entry computation.
    """
    computations, entry = _computations(text)
    counts = _counts(computations, entry)
    found: Counter[Collective] = Counter()
    started, fused = _started(computations), set(_FUSED.findall(text))
    for name, lines in computations.items():
        if counts[name]:
            again = name in fused and not any(_STARTS in line for line in lines)
            own = [line for line in lines if not (again and _channel(line) in started)]
            for each in _in_computation(name, own, mesh):
                found[each] += counts[name]
    merged = [dataclasses.replace(each, count=count * each.count) for each, count in found.items()]
    return sorted(merged, key=lambda each: -each.sent)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif (head := _COMPUTATION.match(line)) and not line.startswith((" ", "HloModule")):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None:
            current.append(line)
    if not entry:
        raise ValueError("the text has no ENTRY computation; give optimized HLO")
    return found, entry


def _counts(computations: Mapping[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs; a branch counts as if it were always taken."""
    calls = {
        name: [call for line in lines for call in _calls(line, lines, computations)]
        for name, lines in computations.items()
    }
    counts: Counter[str] = Counter({entry: 1})
    for name in _callers_first(calls, entry):
        for called, times in calls[name]:
            counts[called] += counts[name] * times
    return counts


def _calls(
    line: str, around: Sequence[str], computations: Mapping[str, list[str]]
) -> Iterable[tuple[str, int]]:
    """`(computation, times)` that an instruction calls; functions that reduce two values are no
    calls. around: the lines of its own computation.
    """
    parsed = _INSTRUCTION.match(line)
    if parsed is None or parsed[3].startswith(REDUCERS):
        return
    trips = _trips(line, around, computations) if parsed[3] == "while" else 1
    names = [(name, trips) for name in _CALLED.findall(line)]
    if branches := _BRANCHES.search(line):
        names += [(name.strip().lstrip("%"), 1) for name in branches[1].split(",")]
    yield from (each for each in names if each[0] in computations)


def _trips(line: str, around: Sequence[str], computations: Mapping[str, list[str]]) -> int:
    """How often a loop runs: as the compiler notes it, or by the constant that its condition
    compares with, less what the counter begins with (a first turn may stand before the loop); 1
    where neither is there.
    """
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = {found[1]: int(found[2]) for each in lines if (found := _BOUND.search(each))}
    for each in lines:
        if "direction=LT" in each:
            names = re.findall(r"%([\w.\-]+)", each)
            compared = [bounds[name] for name in names if name in bounds]
            begins = [_begins(line, around, lines, name) for name in names if name not in bounds]
            return max(compared, default=1) - max(begins, default=0)
    return 1


def _begins(line: str, around: Sequence[str], condition: Sequence[str], name: str) -> int:
    """What a loop's counter, `name` in its condition, begins with; 0 where it is not plain."""
    index = re.search(
        rf"%{re.escape(name)} = .* get-tuple-element\(.*index=(\d+)", "\n".join(condition)
    )
    operand = re.search(r" while\(%([\w.\-]+)\)", line)
    if index is None or operand is None:
        return 0
    made = {found[1]: found[2] for each in around if (found := _MADE.match(each))}
    inputs = re.findall(r"%([\w.\-]+)", made.get(operand[1], ""))
    value = inputs[int(index[1])] if int(index[1]) < len(inputs) else ""
    while found := re.match(r"copy\(%([\w.\-]+)", made.get(value, "")):
        value = found[1]
    constant = re.match(r"constant\((\d+)\)", made.get(value, ""))
    return int(constant[1]) if constant else 0


def _callers_first(calls: Mapping[str, list[tuple[str, int]]], entry: str) -> list[str]:
    """Computations in an order in which each stands after all that call it."""
    done: list[str] = []
    state: dict[str, int] = {}
    stack = [(entry, False)]
    while stack:
        name, left = stack.pop()
        if left:
            done.append(name)
        elif name not in state:
            state[name] = 1
            stack.append((name, True))
            stack.extend((called, False) for called, _ in calls[name])
    return done[::-1]


def _started(computations: Mapping[str, list[str]]) -> set[str | None]:
    """Channels of collectives that a TPU starts, carries on and ends in fusions of their own, each
    of which shows the collective again; others may have the same channel.
    """
    return {
        channel
        for lines in computations.values()
        if any(_STARTS in line for line in lines)
        for line in lines
        if (channel := _channel(line)) is not None
    }


def _channel(line: str) -> str | None:
    found = _CHANNEL.search(line)
    return found[1] if found else None


def _in_computation(
    name: str, lines: Iterable[str], mesh: Mapping[str, int]
) -> Iterable[Collective]:
    for line in lines:
        parsed = _INSTRUCTION.match(line)
        if parsed is None:
            continue
        _, shape, opcode, rest = parsed.groups()
        if opcode == "send" and "is_host_transfer=true" in rest:
            dtype, size = _largest(shape)
            named = _RENDEZVOUS.search(rest)
            yield Collective(
                "between_slices", dtype, size, 2, (), 1, _shown(named[1] if named else "")
            )
        kind = opcode.removesuffix("-start")
        if kind not in KINDS or opcode.endswith("-done"):
            continue
        dtype, size = _moved(kind, opcode, shape)
        groups = _groups(rest)
        devices = len(groups[0]) if groups else math.prod(mesh.values())
        if kind == "reduce-scatter":
            size *= devices
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"  # XLA's fusion of an all-reduce with the slice that is kept
        if kind == "collective-permute":
            devices = 2
        yield Collective(_shown(kind), dtype, size, devices, _axes(groups, mesh), 1)


def _shown(kind: str) -> str:
    return {"collective-permute": "permute"}.get(kind, kind.replace("-", "_"))


def _moved(kind: str, opcode: str, shape: str) -> tuple[str, float]:
    """dtype and bytes of what a collective leaves on a device: one of several arrays is their sum;
    what starts one may show its operands too, which are no larger.
    """
    arrays = [_largest(f"{dtype}[{dims}]") for dtype, dims in _SHAPE.findall(shape)]
    dtype, largest = max(arrays, key=lambda each: each[1], default=("", 0.0))
    if kind == "collective-permute" or (opcode.endswith("-start") and kind != "all-reduce"):
        return dtype, largest
    return dtype, sum(size for _, size in arrays)


def _largest(text: str) -> tuple[str, float]:
    """dtype and bytes of the largest array whose shape stands in a text."""
    best = ("", 0.0)
    for dtype, dims in _SHAPE.findall(text):
        count = math.prod(int(size) for size in dims.split(",") if size)
        size = count * DTYPE_BITS.get(dtype, 8) / 8
        best = max(best, (dtype, size), key=lambda each: each[1])
    return best


def _groups(rest: str) -> list[list[int]]:
    if named := _MESH.search(rest):
        return _of_axes(*named.groups())
    if iota := _IOTA.search(rest):
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.group(1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape).tolist()
    if listed := _LISTED.search(rest) or _PAIRS.search(rest):
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return [[int(n) for n in group.split(",") if n] for group in groups if group]
    return []


def _of_axes(axes: str, order: str | None, kept: str) -> list[list[int]]:
    """Groups written as `mesh['a'=2,'b'=8] {'b':(2)4}`: along `a` and what is left of `b`, devices
    differ from group to group; `(2)4` is the part of size 4 that stands inside 2 outer ones.
    """
    sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", axes)}
    parts: list[tuple[int, bool]] = []
    wanted = {name: (pre, size) for name, pre, size in _PART.findall(kept)}
    for name, size in sizes.items():
        pre, part = wanted.get(name, ("", ""))
        if name not in wanted:
            parts.append((size, False))
        elif not part:
            parts.append((size, True))
        else:
            outer, inner = int(pre), int(part)
            parts += [(outer, False), (inner, True), (size // (outer * inner), False)]
    ids = np.array(
        [int(n) for n in order.split(",")] if order else range(math.prod(sizes.values()))
    )
    ids = ids.reshape([size for size, _ in parts])
    within = [axis for axis, (_, inside) in enumerate(parts) if inside]
    across = [axis for axis, (_, inside) in enumerate(parts) if not inside]
    count = math.prod(parts[axis][0] for axis in within)
    return ids.transpose(across + within).reshape(-1, count).tolist()


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which the devices of a group differ, for groups that are alike."""
    sizes = tuple(mesh.values())
    ids = [device for group in groups for device in group]
    if not ids or max(ids) >= math.prod(sizes):
        return ()
    varying: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))
        varying |= {axis for axis, row in zip(mesh, places, strict=True) if len(set(row)) > 1}
    return tuple(axis for axis in mesh if axis in varying)
