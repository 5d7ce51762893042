"""What `benchmarks/quantization.py` runs: each method at the bits and groups that it is meant for.

A method of `surgery.METHODS` that no variant names runs by its own settings: `bits` if it has them,
and `group` or `block`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery import METHODS, Method
from weights import nearest

PER_COLUMN = -1
"""What methods take for one group of all input channels; 0 on the command line."""


@dataclass(frozen=True)
class Variant:
    """A method with some of its settings.

    method: its name in `surgery.METHODS`.
    settings: those that are not its defaults.
    bits: what it codes in; empty: its setting `bits` says.
    group: the setting that says how many input channels share a scale; empty: it has none.
    per_column: whether one group of all channels makes sense.
    seeds: of the calibration windows, at most.
    planted: bits at which it also runs on the model with outlier channels.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] = ()
    group: str = "group"
    per_column: bool = True
    seeds: int | None = None
    planted: tuple[int, ...] = ()


VARIANTS: dict[str, Variant] = {
    "rtn": Variant("rtn", planted=(3,)),
    "rtn_symmetric": Variant("rtn", {"symmetric": True}, bits=(4,)),
    "nf4": Variant("nf4", {"double": False}, bits=(4,), group="block"),
    "nf4_double": Variant("nf4", {"double": True}, bits=(4,), group="block"),
    "fp4": Variant("fp4", {"double": False}, bits=(4,), group="block"),
    "fp4_double": Variant("fp4", {"double": True}, bits=(4,), group="block"),
    "finequant": Variant("finequant", group="min_group", per_column=False),
    "gptq": Variant("gptq"),
    "gptq_act_order": Variant("gptq", {"act_order": True}, seeds=1),
    "awq": Variant("awq", planted=(3,)),
    "smoothquant": Variant("smoothquant", bits=(8,), group="", planted=(8,)),
    "int8": Variant("int8", bits=(8,), group="", planted=(8,)),
    "int8_plain": Variant("int8", {"outliers": "none"}, bits=(8,), group="", planted=(8,)),
}
"""Name in the table -> variant."""


@dataclass(frozen=True)
class Case:
    """A row to be.

    group: input channels that share a scale, 0 for all, None where the method has no groups.
    seed: of the calibration windows, None where the method needs none.
    planted: on the model with outlier channels.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    bits: int | None
    group: int | None
    seed: int | None = None
    planted: bool = False

    def build(self) -> Method:
        """The method; raises `ValueError` if its settings are none."""
        return METHODS[self.method](**self.settings)

    @property
    def label(self) -> str:
        """`gptq, 3 bits, group 64, seed 0`."""
        parts = [self.name]
        parts += [] if self.bits is None else [f"{self.bits} bits"]
        parts += [] if self.group is None else [f"group {self.group}" if self.group else "columns"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        parts += ["outliers planted"] if self.planted else []
        return ", ".join(parts)


def variants() -> dict[str, Variant]:
    """`VARIANTS`, and one for each other method that is registered."""
    named = {variant.method for variant in VARIANTS.values()}
    return VARIANTS | {name: inferred(name) for name in METHODS if name not in named}


def inferred(name: str) -> Variant:
    """The variant of a method that the table does not name."""
    known = {each.name for each in dataclasses.fields(METHODS[name])}
    return Variant(name, group=next((part for part in ("group", "block") if part in known), ""))


def chosen(names: Sequence[str]) -> dict[str, Variant]:
    """The variants of these names, or all variants of these methods; all of all for no name.

    Raises `ValueError` for a name of neither.
    """
    known = variants()
    if not names:
        return known
    found: dict[str, Variant] = {}
    for name in names:
        ours = {key: one for key, one in known.items() if name == key}
        ours = ours or {key: one for key, one in known.items() if name == one.method}
        if not ours:
            near = nearest(name, [*known, *METHODS]) or ", ".join(known)
            raise ValueError(f"--methods: {name!r} is neither a method nor a variant; near: {near}")
        found |= ours
    return found


def cases(
    variants: Mapping[str, Variant],
    bits: Iterable[int],
    groups: Iterable[int],
    seeds: Iterable[int],
    planted: bool = False,
) -> Iterator[Case]:
    """All that have a definition; bits that a variant does not have are passed over. At 8 bits the
    first seed is the only one: what seeds change there is less than figures show.

    planted: those of the model with outlier channels, not those of the model as it is.
    """
    bits, groups, seeds = tuple(bits), tuple(groups), tuple(seeds)
    for name, variant in variants.items():
        swept = has_bits(variant)
        for count in bits_of(variant, bits):
            if planted and count not in variant.planted:
                continue
            ours = seeds[:1] if count == 8 else seeds[: variant.seeds]
            for group in groups_of(variant, groups):
                settings = dict(variant.settings)
                settings |= {"bits": count} if swept else {}
                settings |= {variant.group: group or PER_COLUMN} if variant.group else {}
                case = Case(name, variant.method, settings, count, group, planted=planted)
                yield from seeded(case, ours)


def has_bits(variant: Variant) -> bool:
    """Whether the method has a setting of that name."""
    return "bits" in {each.name for each in dataclasses.fields(METHODS[variant.method])}


def bits_of(variant: Variant, wanted: tuple[int, ...]) -> tuple[int | None, ...]:
    """Those wanted that it has; None for a method that does not say."""
    if variant.bits:
        return tuple(count for count in wanted if count in variant.bits)
    return wanted if has_bits(variant) else (None,)


def groups_of(variant: Variant, wanted: tuple[int, ...]) -> tuple[int | None, ...]:
    """Those wanted that make sense; None for a method without groups."""
    if not variant.group:
        return (None,)
    return tuple(group for group in wanted if group or variant.per_column)


def seeded(case: Case, seeds: tuple[int, ...]) -> Iterator[Case]:
    """The case with each seed if it calibrates."""
    try:
        calibrates = case.build().inputs != "none"
    except ValueError:
        calibrates = False  # its row will say what is wrong
    yield from (dataclasses.replace(case, seed=seed) for seed in seeds) if calibrates else (case,)
