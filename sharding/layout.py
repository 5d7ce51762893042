"""The layout: which mesh axes each logical axis is split over, per role.

Roles are where ZeRO's stages live: what splits the weights splits the gradients, and what splits
the gradients splits the optimizer state (weights ⊆ gradients ⊆ optimizer), never the other way
round.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.mesh import AXES, show_sizes
from sharding.rules import Axes
from weights import nearest

Table = tuple[tuple[str, tuple[str, ...]], ...]

TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "hidden": (),
    "vocab": ("tensor",),
    "d_model": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "d_ff": ("tensor",),
    "experts": ("expert",),
    "positions": (),
    "layers": ("stage",),
}
"""Logical axis -> mesh axes. `batch`, `length` and `hidden` are axes of activations only."""

ROLES = ("weights", "gradients", "optimizer")

GATHERS = ("auto", "float32", "bfloat16", "int8")
REDUCES = (*GATHERS, "int4")
"""How weights and gradients may travel; "auto" leaves it to the compiler."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Where every array lives.

    rules: "model" for the rules that the model brings, "auto" to derive them from names and shapes.
    zero: what fsdp splits: 3 weights, gradients and state; 2 gradients and state; 1 state; 0 none.
    weights: changes to the table for weights and activations, ((logical, mesh axes), …).
    gradients: changes to the table for gradients, made after those for weights.
    optimizer: changes to the table for optimizer state, made after those for gradients.
    extra_rules: (pattern, logical axes) pairs that stand before the model's own rules.
    context_attention: "ring" passes keys and values around the devices; "all_gather" collects them.
    gather: how weights travel: "float32", "bfloat16" or "int8"; "auto" leaves it to the compiler.
    reduce: how gradients travel, those or "int4"; anything but "auto" makes both explicit.
    block: values that share a scale in int8 and int4; 0 is one scale an array, for comparison.
    secondary: mesh axes, of those of weights, that split a copy kept from the forward to the
        backward pass, which is then gathered over them alone; empty keeps none.
    error_feedback: add what the reduction once a step rounded off to the next step's gradient.
    """

    rules: str = "model"
    zero: int = 3
    weights: tuple[tuple[str, tuple[str, ...]], ...] = ()
    gradients: tuple[tuple[str, tuple[str, ...]], ...] = ()
    optimizer: tuple[tuple[str, tuple[str, ...]], ...] = ()
    extra_rules: tuple[tuple[str, Axes], ...] = ()
    context_attention: str = "ring"
    gather: str = "auto"
    reduce: str = "auto"
    block: int = 256
    secondary: tuple[str, ...] = ()
    error_feedback: bool = False

    def __post_init__(self) -> None:
        _one_of("sharding.rules", self.rules, ("model", "auto"))
        _one_of("sharding.zero", self.zero, (0, 1, 2, 3))
        _one_of("sharding.context_attention", self.context_attention, ("ring", "all_gather"))
        _one_of("sharding.gather", self.gather, GATHERS)
        _one_of("sharding.reduce", self.reduce, REDUCES)
        if self.block < 0:
            raise ValueError(f"sharding.block={self.block}: give the values that share a scale")

    @property
    def collectives(self) -> Collectives | None:
        """The explicit ones, or None where the compiler places them."""
        explicit = self.gather != "auto" or self.reduce != "auto"
        if not (explicit or self.secondary or self.error_feedback):
            return None
        gather, reduce = (
            "float32" if name == "auto" else name for name in (self.gather, self.reduce)
        )
        return Collectives(gather, reduce, self.block, self.secondary, self.error_feedback)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """How weights and gradients travel where the step says so itself; see `ShardingConfig`."""

    gather: str = "float32"
    reduce: str = "float32"
    block: int = 256
    secondary: tuple[str, ...] = ()
    error_feedback: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the tables that map logical axes onto it; hashable, to be static under `jit`.

    `weights` also serves activations. Tables hold `(logical axis, mesh axes)` pairs. `collectives`
    are those that a training step places itself (`sharding.hierarchical`), if it does.
    """

    mesh: Mesh
    weights: Table = tuple(TABLE.items())
    gradients: Table = tuple(TABLE.items())
    optimizer: Table = tuple(TABLE.items())
    context_attention: str = "ring"
    collectives: Collectives | None = None

    def __post_init__(self) -> None:
        for role in ROLES:
            _check_table(role, getattr(self, role), self.mesh)
        _check_subset("weights", self.weights, "gradients", self.gradients)
        _check_subset("gradients", self.gradients, "optimizer", self.optimizer)
        if self.collectives is not None:
            _check_secondary(self, self.collectives.secondary)

    def spec(self, axes: Axes, role: str = "weights") -> PartitionSpec:
        """The partition spec of an array with these logical axes; mesh axes of size 1 are left out.

        Raises `ValueError` for an unknown logical axis, or if two axes of the array ask for the
        same mesh axis.
        """
        table = dict(getattr(self, _one_of("role", role, ROLES)))
        return PartitionSpec(*(_entry(mesh_axes) for mesh_axes in self._mesh_axes(axes, table)))

    def sharding(self, axes: Axes, role: str = "weights") -> NamedSharding:
        """`spec` on this layout's mesh."""
        return NamedSharding(self.mesh, self.spec(axes, role))

    def size(self, logical: str, role: str = "weights") -> int:
        """How many pieces a logical axis is split into."""
        return math.prod(
            self.mesh.shape[axis] for axis in axis_names(self.spec((logical,), role)[0])
        )

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes of more than one device that split the batch."""
        return axis_names(self.spec(("batch",))[0])

    def replicate(self, *logical: str) -> Layout:
        """The same layout with these logical axes whole on every device, in all roles."""
        return dataclasses.replace(
            self,
            **{
                role: _merge(getattr(self, role), [(name, ()) for name in logical])
                for role in ROLES
            },
        )

    def _mesh_axes(self, axes: Axes, table: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
        found, owner = [], {}
        for logical in axes:
            if logical is not None and logical not in table:
                raise ValueError(
                    f"unknown logical axis {logical!r} in {axes}; nearest: "
                    f"{nearest(logical, table) or sorted(table)}"
                )
            wanted = table[logical] if logical is not None else ()
            present = tuple(axis for axis in wanted if self.mesh.shape.get(axis, 1) > 1)
            for axis in present:
                if axis in owner:
                    raise ValueError(
                        f"axes {axes} use mesh axis {axis!r} twice (for {owner[axis]!r} and "
                        f"{logical!r}): an array is split over it once"
                    )
                owner[axis] = logical
            found.append(present)
        return found


def make_layout(mesh: Mesh, config: ShardingConfig | None = None) -> Layout:
    """The layout of a config: `TABLE`, then its overrides, then ZeRO's stage, role by role.

    What a role adds to the mesh axes of the one before stands after them, so that a device's piece
    lies within the piece that it has in that role, and nothing moves between the two.
    """
    config = config or ShardingConfig()
    weights = _merge(tuple(TABLE.items()), config.weights)
    gradients = _merge(weights, config.gradients)
    optimizer = _merge(gradients, config.optimizer)
    weights = _without_fsdp(weights) if config.zero < 3 else weights
    gradients = _without_fsdp(gradients) if config.zero < 2 else gradients
    optimizer = _without_fsdp(optimizer) if config.zero < 1 else optimizer
    gradients = _within(weights, gradients)
    optimizer = _within(gradients, optimizer)
    collectives = config.collectives
    return Layout(mesh, weights, gradients, optimizer, config.context_attention, collectives)


def check_heads(layout: Layout, num_heads: int, kv_heads: int) -> Layout:
    """The layout for a model with these heads, since no head is ever split.

    Kernels hold heads flattened (`num_heads * head_dim` columns), so divisibility of columns is not
    enough. If `kv_heads` does not divide, keys and values stay whole on every device and a note is
    logged. Raises `ValueError` with a mesh that would work if `num_heads` does not divide.
    """
    pieces = layout.size("heads")
    if num_heads % pieces:
        mesh_axes = layout.spec(("heads",))[0]
        raise ValueError(
            f"{num_heads} attention heads do not divide over {pieces} devices of mesh axis "
            f"{mesh_axes!r}; a mesh that would work: "
            f"{suggest_mesh(layout.mesh, [(num_heads, axis_names(mesh_axes))])}"
        )
    if kv_heads % layout.size("kv_heads"):
        logger.info(
            "%d key/value heads do not divide over mesh axis %r (%d): each device keeps all",
            kv_heads,
            layout.spec(("kv_heads",))[0],
            layout.size("kv_heads"),
        )
        return layout.replicate("kv_heads")
    return layout


def check_experts(layout: Layout, num_experts: int) -> None:
    """Raise `ValueError` with a mesh that would work if the experts do not divide over theirs."""
    pieces = layout.size("experts")
    if num_experts % pieces:
        mesh_axes = layout.spec(("experts",))[0]
        raise ValueError(
            f"{num_experts} experts do not divide over {pieces} devices of mesh axis "
            f"{mesh_axes!r}; a mesh that would work: "
            f"{suggest_mesh(layout.mesh, [(num_experts, axis_names(mesh_axes))])}"
        )


def suggest_mesh(mesh: Mesh | AbstractMesh, needs: list[tuple[int, tuple[str, ...]]]) -> str:
    """A mesh near this one that divides every (size, mesh axes); `data` takes the freed devices."""
    sizes = dict(mesh.shape)
    for size, axes in needs:
        for axis in axes:
            rest = math.prod(sizes[other] for other in axes if other != axis)
            if size % (rest * sizes[axis]):
                sizes[axis] = math.gcd(size // rest if size % rest == 0 else 1, sizes[axis])
    freed = mesh.size // math.prod(sizes.values())
    filler = "data" if "data" in sizes else next(iter(sizes))
    return show_sizes({**sizes, filler: sizes[filler] * freed})


def _entry(mesh_axes: tuple[str, ...]) -> Any:
    if not mesh_axes:
        return None
    return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec, always as a tuple."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _merge(table: Table, changes: Any) -> Table:
    merged = dict(table)
    for logical, mesh_axes in changes:
        merged[logical] = axis_names(mesh_axes)
    return tuple(merged.items())


def _without_fsdp(table: Table) -> Table:
    return tuple(
        (logical, axes if logical == "batch" else tuple(axis for axis in axes if axis != "fsdp"))
        for logical, axes in table
    )


def _within(inner: Table, outer: Table) -> Table:
    """The outer role's table, axes ordered so that pieces lie within those of the inner role."""
    first = dict(inner)

    def ordered(logical: str, axes: tuple[str, ...]) -> tuple[str, ...]:
        before = first.get(logical, ())
        rest = tuple(axis for axis in axes if axis not in before)
        return (*before, *rest) if set(before) <= set(axes) else axes

    return tuple((logical, ordered(logical, axes)) for logical, axes in outer)


def _check_table(role: str, table: Table, mesh: Mesh) -> None:
    known = {*AXES, *mesh.axis_names}
    for logical, axes in table:
        for axis in axes:
            if axis not in known:
                raise ValueError(
                    f"{role} table maps {logical!r} to unknown mesh axis {axis!r}; nearest: "
                    f"{nearest(axis, known) or ', '.join(AXES)}"
                )


def _check_subset(inner: str, small: Table, outer: str, large: Table) -> None:
    wide = dict(large)
    for logical, axes in small:
        missing = set(axes) - set(wide.get(logical, ()))
        if missing:
            raise ValueError(
                f"{inner} split {logical!r} over {sorted(axes)} but {outer} only over "
                f"{sorted(wide.get(logical, ()))}: each role must be split at least as far as the "
                f"one before it ({' ⊆ '.join(ROLES)})"
            )


def _check_secondary(layout: Layout, secondary: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the copy is split less far than the weights, but as they are."""
    for axis in secondary:
        if axis not in AXES:
            near = nearest(axis, AXES) or ", ".join(AXES)
            raise ValueError(f"sharding.secondary: unknown mesh axis {axis!r}; nearest: {near}")
    split = {axis for name, axes in layout.weights if name != "batch" for axis in axes}
    shared = [axis for axis in layout.batch_axes if axis in split]
    if secondary and not set(secondary) < set(shared):
        raise ValueError(
            f"sharding.secondary={secondary}: give some, not all, of the mesh axes that split both "
            f"weights and batch, which are {tuple(shared)} (secondary ⊂ weights)"
        )


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        close = nearest(str(value), [str(item) for item in known])
        raise ValueError(
            f"{name} is {value!r}, not one of {known}" + (f"; nearest: {close}" if close else "")
        )
    return value
