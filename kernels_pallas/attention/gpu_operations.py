"""The few operations of Hopper's Pallas back end that the attention kernels use, as they are called
in every supported version of JAX, and as its CPU simulator knows them.

`simulate` runs the same kernel in that simulator: barriers, copies and slots as on the device, but
products and layouts, which it lacks, as plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array

_TAKES_REFERENCES = jax.__version_info__ >= (0, 11)
"""Later versions read and transpose a reference where earlier ones took it with an index."""


def matrix() -> Any:
    """Layout of a product's result in registers."""
    return plgpu.Layout.WGMMA


def of_rows() -> Any:
    """Layout of one number a row of a product."""
    return plgpu.Layout.WGMMA.reduce(1)


def of_columns() -> Any:
    """Layout of one number a column of a product."""
    return plgpu.Layout.WGMMA.reduce(0)


def load(ref: Any, layout: Any, simulate: bool) -> Array:
    """A vector from global or shared memory into registers."""
    if simulate:
        return ref[...]
    read: Any = plgpu.load
    index = () if _TAKES_REFERENCES else ((),)
    return read(ref, *index, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float, simulate: bool) -> Array:
    """A float32 constant: of one axis, a number a row; of two, like a product."""
    x = jnp.full(shape, value, jnp.float32)
    if simulate:
        return x
    return plgpu.layout_cast(x, matrix() if len(shape) == 2 else of_rows())


def down(x: Array, shape: tuple[int, ...]) -> Array:
    """One number a row, over all columns."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def across(x: Array, shape: tuple[int, ...]) -> Array:
    """One number a column, over all rows."""
    return jax.lax.broadcast_in_dim(x, shape, [1])


def product(
    a: Any,
    b: Any,
    simulate: bool,
    transposed: bool = False,
    issued: Callable[[], None] | None = None,
) -> Array:
    """`a b` or `a b^T` in float32 of references to shared memory; `issued` is called between the
    start of the product and the wait for it.
    """
    shape = (a.shape[0], b.shape[0 if transposed else 1])
    if simulate:
        if issued is not None:
            issued()
        return _plain(a, b, transposed)

    def run(total: Any) -> Array:
        plgpu.wgmma(total, a, transposed_reference(b) if transposed else b)
        if issued is not None:
            issued()
        return total[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def add_product(total: Array, a: Any, b: Any, simulate: bool) -> Array:
    """`total + a b` with `a` in registers and `b` a reference to shared memory."""
    if simulate:
        return total + _plain(a, b, False)

    def run(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, a, b)

    summed: Any = pl.run_state(run)(plgpu.ACC.init(total))
    return summed


def _plain(a: Any, b: Any, transposed: bool) -> Array:
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    return jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)


def transposed_reference(ref: Any) -> Any:
    """A reference to shared memory of two axes, with its axes swapped."""
    if _TAKES_REFERENCES:
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def tiles(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for operands of products."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def simulator() -> Any:
    """What `interpret` takes to run a kernel in the simulator."""
    known = getattr(plgpu, "InterpretGPUParams", None)
    if known is None:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as known
    return known()
