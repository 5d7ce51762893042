"""Attention of a step's queries to one layer of stored keys: by the decode kernel where there is
one and the queries are few, else by attention.

On a mesh each device attends with its own rows and heads, since the compiler cannot partition a
kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import attention
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.target import current_target
from model.caches.protocol import StepMeta
from sharding import Layout, context_attention

Array = jax.Array
AXES = ("layers", "batch", "kv_heads", None, None)
"""Logical axes of stored keys and values `[layers, batch, kv_heads, slots, head_dim]`."""
MOST_QUERIES = 31
"""Of a sequence; more fill a block of the attention kernel."""
DECODERS = {"tpu": "tpu", "hopper": "gpu"}
"""Implementation of attention -> that of decode attention, which is also its platform's name."""


def attend(
    keys: Array,
    values: Array,
    layer: Any,
    q: Array,
    meta: StepMeta,
    key_positions: Array,
    *,
    rolling: bool = False,
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    """Causal attention of rotated q `[batch, length, heads, head_dim]`, whose own keys and values
    are stored already.

    Args:
        keys: `[layers, batch, kv_heads, slots, head_dim]`, rotated.
        values: like keys.
        layer: int or `int32[]`.
        q: the step's queries.
        meta: the step.
        key_positions: `int32[batch, slots]`; after every query where a slot holds nothing yet.
        rolling: position p is in slot `p % slots`, else in slot p.
        layout: where the arrays live; None is one device.
        options: scale, window, soft_cap, alibi_slopes, return_lse, implementation.
    """
    name = DECODERS.get(options.get("implementation") or "tpu")
    if name == current_target().platform and _can_decode(q, keys, meta):
        options |= {"layer": layer, "rolling": rolling}
        options["implementation"] = name if options.get("implementation") else None
        return decode(q, keys, values, meta.lengths, layout=layout, **options)
    whole: Callable[..., Any] = attention
    if layout is not None and not options.get("return_lse"):
        # The slots of a cache are never split.
        whole = functools.partial(context_attention, attention, layout=layout.replicate("length"))
    return whole(
        q,
        jnp.swapaxes(keys[layer], 1, 2).astype(q.dtype),
        jnp.swapaxes(values[layer], 1, 2).astype(q.dtype),
        query_positions=meta.positions,
        key_positions=key_positions,
        **options,
    )


def decode(
    q: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *,
    layer: Any,
    alibi_slopes: Array | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    """`kernels_pallas.decode_attention` on each device of a layout, in the type of the cache; its
    gradient is the plain function's.
    """
    arrays = (q.astype(keys.dtype), keys, values, lengths, jnp.asarray(layer, jnp.int32))
    call = functools.partial(_differentiable, options)
    if layout is not None and layout.mesh.size > 1:
        call = _by_device(call, _dividing(layout, q, keys))
    out, lse = call(*arrays, alibi_slopes)
    return (out.astype(q.dtype), lse) if options.get("return_lse") else out.astype(q.dtype)


def _can_decode(q: Array, keys: Array, meta: StepMeta) -> bool:
    """Whether the queries are few, each row's last tokens, and no wider than the cache."""
    queries = q.shape[1]
    last = queries == 1 or not meta.padded
    return last and queries <= MOST_QUERIES and jnp.promote_types(q.dtype, keys.dtype) == keys.dtype


def _call(options: Mapping[str, Any], *arrays: Any) -> tuple[Array, Array | None]:
    """Output and log-sum-exp; None unless asked for."""
    q, keys, values, lengths, layer, slopes = arrays
    out = decode_attention(q, keys, values, lengths, layer=layer, alibi_slopes=slopes, **options)
    return out if options.get("return_lse") else (out, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(options: Mapping[str, Any], *arrays: Any) -> tuple[Array, Array | None]:
    return _call(options, *arrays)


@_differentiable.defjvp
def _tangents(options: Mapping[str, Any], arrays: Any, tangents: Any) -> tuple[Any, Any]:
    plain = functools.partial(_call, {**options, "implementation": "plain"})
    return jax.jvp(plain, arrays, tangents)


def _by_device(call: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    heads, rows = layout.spec(("batch", None, "heads", None)), layout.spec(("batch",))
    stored, whole = layout.spec(AXES), layout.spec(())
    return jax.shard_map(
        call,
        mesh=layout.mesh,
        in_specs=(heads, stored, stored, rows, whole, layout.spec(("heads",))),
        out_specs=(heads, layout.spec(("batch", None, "heads"))),
        check_vma=False,
    )


def _dividing(layout: Layout, q: Array, keys: Array) -> Layout:
    """The layout with what does not divide whole on each device; heads are split as their keys."""
    sizes = {"batch": q.shape[0], "heads": q.shape[2], "kv_heads": keys.shape[2]}
    layout = layout.replicate(*(name for name in sizes if sizes[name] % layout.size(name)))
    if layout.spec(("heads",)) == layout.spec(("kv_heads",)):
        return layout
    return layout.replicate("heads", "kv_heads")
