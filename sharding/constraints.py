"""Constraints on activations inside a compiled function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.layout import Layout, axis_names
from sharding.rules import Axes


def constrain(x: jax.Array, axes: Axes, layout: Layout | None) -> jax.Array:
    """`x` laid out by its logical axes, e.g. `constrain(x, ("batch", "length", "hidden"), layout)`.

    The identity without a layout or on one device. A dimension that its mesh axes do not divide
    (one token of a decoding step over `context`, say) is kept whole: a constraint places values, it
    never changes them.
    """
    if layout is None or layout.mesh.size == 1:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    spec = PartitionSpec(
        *(
            entry if size % _pieces(layout, entry) == 0 else None
            for size, entry in zip(x.shape, layout.spec(axes), strict=True)
        )
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def map_devices(
    run: Callable[..., Any], layout: Layout, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`run` by each device on its own part, over all axes of the mesh; inside a function that is
    mapped over some of them already (a pipeline's stages), over the others.
    """
    around = jax.sharding.get_abstract_mesh()
    inside = {name for name in around.axis_names if name in around.manual_axes}
    return jax.shard_map(
        run,
        mesh=None if inside else layout.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(layout.mesh.axis_names) - inside,
        check_vma=False,
    )


def gather_rows(table: Any, layout: Layout | None, rows: str = "vocab") -> Any:
    """A table `[rows, d_model]` made ready for lookup: whole rows, split only along the rows' axis.

    Without it XLA moves activations to where the columns of a table split over `d_model` are, and
    in the backward pass holds the whole batch's on every device. Weight formats and tables that are
    not split so are returned as they are.
    """
    if layout is None or not hasattr(table, "ndim") or layout.size("d_model") == 1:
        return table
    return constrain(table, (rows, None), layout)


def _pieces(layout: Layout, entry: object) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in axis_names(entry))
