"""Storing the keys and values of a step in pages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode_attention.cost import estimate
from kernels_pallas.paged_attention import cost
from kernels_pallas.target import Target

Array = jax.Array
BLOCK = 64
"""Tokens that a step of the TPU kernel stores, all on their way at once."""
RUN = 8
"""Tokens that are stored by one copy if they go to neighbouring slots of a page."""


def plain(k: Array, v: Array, pages: Array, slots: Array, *, layer: Any = None) -> Array:
    """`pages` with tokens k and v `[tokens, kv_heads, head_dim]` in slots `int32[tokens]`.

    Pages are `[pages, page_size, 2 * kv_heads, head_dim]`, or with a leading layer axis if there is
    a `layer`. A slot is `page * page_size + offset`; those that are -1 are dropped.
    """
    check(k, v, pages, slots, layer)
    size = pages.shape[-3]
    if len(slots) == 1:
        # One write would become an update of a slice, which a CPU fuses with a copy of all pages.
        k, v, slots = (jnp.repeat(x, 2, axis=0) for x in (k, v, slots))
    page = jnp.where(slots < 0, pages.shape[-4], slots // size)
    at = (page, slots % size) if layer is None else (layer, page, slots % size)
    return pages.at[at].set(_pairs(k, v, pages.dtype), mode="drop")


def on_tpu(
    k: Array,
    v: Array,
    pages: Array,
    slots: Array,
    *,
    layer: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> Array:
    """See `plain`; in place, by copies from on-chip memory, one a token or a run of tokens."""
    whole = pages[None] if layer is None else pages
    missing = -len(slots) % BLOCK
    slots = jnp.pad(slots, (0, missing), constant_values=-1)
    pairs = jnp.pad(_pairs(k, v, pages.dtype), ((0, missing), (0, 0), (0, 0)))
    groups = slots.reshape(-1, RUN)
    steps = jnp.arange(RUN, dtype=jnp.int32)
    size = pages.shape[-3]
    together = jnp.all(groups == groups[:, :1] + steps, axis=1) & (groups[:, 0] >= 0)
    together &= groups[:, 0] % size + RUN <= size
    block = pl.BlockSpec((BLOCK, *pairs.shape[1:]), lambda i, *_: (i, 0, 0))
    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(slots) // BLOCK,),
            in_specs=[block, everywhere],
            out_specs=everywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(whole.shape, whole.dtype),
        input_output_aliases={4: 0},
        cost_estimate=estimate(*cost.append(k, pages)),
        interpret=interpret,
        name="append_to_pages",
    )(slots, together.astype(jnp.int32), _scalar(layer), pairs, whole)
    return out[0] if layer is None else out


def _kernel(
    size: int, slots: Any, together: Any, layer: Any, pairs: Any, _: Any, pages: Any, done: Any
) -> None:
    first = pl.program_id(0) * BLOCK

    def each(what: str) -> None:
        def group(index: Any, _: Any) -> Any:
            run = together[first // RUN + index]
            place = functools.partial(_copy, what, size, pages, pairs, layer[0], done)

            @pl.when(run == 1)
            def _() -> None:
                place(slots[first + index * RUN], index * RUN, RUN)

            @pl.when(run == 0)
            def _() -> None:
                for token in range(RUN):
                    slot = slots[first + index * RUN + token]
                    pl.when(slot >= 0)(functools.partial(place, slot, index * RUN + token, 1))

            return 0

        jax.lax.fori_loop(0, BLOCK // RUN, group, 0)

    each("start")
    each("wait")


def _copy(
    what: str, size: int, pages: Any, pairs: Any, layer: Any, done: Any, slot: Any, token: Any,
    count: int,
) -> None:  # fmt: skip
    destination = pages.at[layer, slot // size, pl.ds(slot % size, count)]
    getattr(pltpu.make_async_copy(pairs.at[pl.ds(token, count)], destination, done), what)()


def _pairs(k: Array, v: Array, dtype: Any) -> Array:
    """`[tokens, 2 * kv_heads, dim]`, keys in the even rows."""
    pairs = jnp.stack([k, v], axis=2)
    return pairs.reshape(len(k), -1, k.shape[-1]).astype(dtype)


def _scalar(layer: Any) -> Array:
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)


def check(k: Array, v: Array, pages: Array, slots: Array, layer: Any) -> None:
    """Raises `ValueError` that names the argument and what would be right."""
    lead = 0 if layer is None else 1
    fits = k.shape == v.shape and k.ndim == 3 and pages.ndim == 4 + lead
    if not fits or pages.shape[-2:] != (2 * k.shape[1], k.shape[2]) or slots.shape != k.shape[:1]:
        raise ValueError(
            "append takes k and v [tokens, kv_heads, dim], slots [tokens] and pages [pages, "
            f"page_size, 2 * kv_heads, dim]{', with a leading layer axis' if lead else ''}; got "
            f"k {k.shape}, v {v.shape}, slots {slots.shape}, pages {pages.shape}"
        )
