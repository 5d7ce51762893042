"""Products with weight formats on a mesh: each device multiplies the part that it holds.

The compiler partitions the product of a plain array by itself, a kernel it cannot. So a format
whose product may be made of parts is multiplied inside `jax.shard_map`: a kernel then sees the
arrays of one device, and products over parts of the inputs are summed. What is split over `fsdp`
is gathered first, as plain weights are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sharding.constraints import map_devices
from sharding.layout import Layout, axis_names
from sharding.rules import Axes
from weights import bias_add, is_format, linear, matmul, prepare, separable, split_units
from weights import specs as specs_of

Array = jax.Array


def split_linear(
    params: Mapping[str, Any],
    x: Array,
    axes: Axes,
    layout: Layout | None,
    rng: Array | None = None,
) -> Array:
    """`weights.linear`: `[batch, length, d_in] -> [batch, length, d_out]`, where `axes` are the
    kernel's logical axes, `("d_model", "heads")`.

    Left to the compiler are plain arrays, formats that are not `weights.separable`, and sizes that
    the mesh does not divide, such as the single row of a decoding step.
    """
    weight = params["kernel"]
    if layout is None or layout.mesh.size == 1 or not is_format(weight):
        return linear(params, x, rng)
    # Activations have `hidden` where weights have `d_model`, which `fsdp` splits.
    inputs, outputs = ("hidden" if axis == "d_model" else axis for axis in axes)
    if not _may_be_split(x, weight, ("batch", "length", inputs, outputs), layout):
        return linear(params, x, rng)
    weight = prepare(weight, "tpu")  # scales that are coded again are whole on every device
    given, made = (layout.spec(("batch", "length", axis)) for axis in (inputs, outputs))
    stored = specs_of(weight, PartitionSpec(given[2], made[2]))
    if getattr(weight, "chosen", None) is not None:
        chosen = jnp.broadcast_to(weight.chosen, x.shape[:2])
        weight = dataclasses.replace(weight, chosen=chosen)
        stored = dataclasses.replace(stored, chosen=PartitionSpec(*given[:2]))
    summed = axis_names(given[2])

    def local(x: Array, weight: Any) -> Array:
        y = matmul(x, weight)
        return jax.lax.psum(y.astype(jnp.float32), summed).astype(y.dtype) if summed else y

    y = map_devices(local, layout, (given, stored), made)(x, weight)
    return bias_add(y, params)


def _may_be_split(x: Array, weight: Any, axes: Axes, layout: Layout) -> bool:
    """Whether the parts make up the product, and the mesh divides `batch, length, inputs,
    outputs`.
    """
    by_row, by_input = separable(weight)
    if not by_row:
        return False
    pieces = [1 if axis is None else layout.size(axis) for axis in axes]
    sizes, units = (*x.shape[:-1], *weight.shape), (1, 1, *split_units(weight))
    divided = all(
        n == 1 or size % (unit * n) == 0 for size, unit, n in zip(sizes, units, pieces, strict=True)
    )
    return divided and (by_input or pieces[2] == 1)
