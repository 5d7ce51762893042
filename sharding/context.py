"""Attention over sequences that are split along their length: context parallelism.

Every device holds a contiguous part of queries, keys and values. In the ring (Liu et al. 2023,
"Ring Attention with Blockwise Transformers") keys and values travel around the `context` axis while
each device attends with its own queries to the part it holds, and partial results merge by their
log-sum-exp; `all_gather` collects all keys and values instead: one collective, more memory.
Positions and segment ids travel along, so packed documents, windows and any order of tokens (a
zig-zag order that balances causal work, say) give what unsplit attention gives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import merge, sees_anything
from kernels_pallas.target import current_target
from sharding.constraints import map_devices
from sharding.layout import Layout, axis_names

Array = jax.Array


def context_attention(
    attend: Callable[..., Any],
    q: Array,
    k: Array,
    v: Array,
    *,
    query_positions: Array,
    key_positions: Array,
    layout: Layout,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    alibi_slopes: Array | None = None,
    kind: str | None = None,
    **options: Any,
) -> Array:
    """`attend` over sequences split along `context`; equal to `attend` on the whole arrays.

    Sequences that are not split are attended to by each device for itself, so that a kernel, which
    the compiler cannot partition, sees the arrays of one device.

    Args:
        attend: `kernels_pallas.attention.attention` or another with its arguments, differentiable
            in its log-sum-exp too.
        q: `[batch, length, heads, head_dim]`; k, v: `[batch, length, kv_heads, head_dim]`.
        query_positions: `int32[batch, length]`, as are key_positions and the segment ids.
        layout: where the arrays live; batch and heads may be split too.
        alibi_slopes: `[heads]`.
        kind: "ring" or "all_gather"; None takes the layout's.
        options: further options of `attend` (causal, window, soft_cap, scale, implementation).

    Returns `[batch, length, heads, head_dim]`. Raises `ValueError` if batch or length do not divide
    over their axes.
    """
    kind = kind or layout.context_attention
    if kind not in KINDS:
        raise ValueError(f"context attention {kind!r} is not one of {sorted(KINDS)}")
    where = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_segment_ids": query_segment_ids,
        "key_segment_ids": key_segment_ids,
    }
    if layout.size("length") == 1 and not _by_device(q, k, layout):
        return attend(q, k, v, **where, alibi_slopes=alibi_slopes, **options)
    _check(q, k, layout)
    inputs = (q, k, v, alibi_slopes, where)
    rows, heads = layout.spec(("batch", "length")), layout.spec(("batch", "length", "heads", None))
    keys = layout.spec(("batch", "length", "kv_heads", None))
    slopes = layout.spec(("heads",))
    in_specs = (heads, keys, keys, slopes, dict.fromkeys(where, rows))
    local = functools.partial(
        _local, KINDS[kind], functools.partial(attend, **options), options, layout
    )
    return map_devices(local, layout, in_specs, heads)(*inputs)


def _local(
    kind: Callable[..., Array],
    attend: Callable[..., Any],
    options: Mapping[str, Any],
    layout: Layout,
    q: Array,
    k: Array,
    v: Array,
    slopes: Array | None,
    where: dict[str, Array | None],
) -> Array:
    """One device's part: its queries against all keys."""
    if layout.size("heads") != layout.size("kv_heads"):
        k, v = _own_kv_heads(q, k, v, layout)
    if layout.size("length") == 1:
        return attend(q, k, v, **where, alibi_slopes=slopes)
    seen = {name: options[name] for name in ("causal", "window", "sinks") if name in options}
    block = _skipping(attend, seen)
    return kind(block, axis_names(layout.spec(("length",))[0]), q, k, v, slopes, where)


def _own_kv_heads(q: Array, k: Array, v: Array, layout: Layout) -> tuple[Array, Array]:
    """Keys and values of this device's query heads, where only queries are split by heads."""
    heads = q.shape[2]
    group = heads * layout.size("heads") // k.shape[2]
    first = jax.lax.axis_index(axis_names(layout.spec(("heads",))[0])) * heads
    if group % heads == 0:
        wanted = jnp.asarray([first // group])
    else:
        wanted = (first + jnp.arange(heads)) // group
    return jnp.take(k, wanted, axis=2), jnp.take(v, wanted, axis=2)


def _skipping(attend: Callable[..., Any], seen: Mapping[str, Any]) -> Callable[..., Any]:
    """`attend` in float32 with its log-sum-exp; no work where no query sees a key."""

    def block(q: Array, slopes: Array | None, k: Array, v: Array, where: dict[str, Any]) -> Any:
        def work() -> tuple[Array, Array]:
            out, lse = attend(q, k, v, **where, alibi_slopes=slopes, return_lse=True)
            return out.astype(jnp.float32), lse.astype(jnp.float32)

        def nothing() -> tuple[Array, Array]:
            shape = (*q.shape[:-1], v.shape[-1])
            return jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -jnp.inf, jnp.float32)

        return jax.lax.cond(sees_anything(**where, **seen), work, nothing)

    return block


def _all_gather(
    block: Callable[..., Any],
    axes: tuple[str, ...],
    q: Array,
    k: Array,
    v: Array,
    slopes: Array | None,
    where: dict[str, Any],
) -> Array:
    gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
    queries, keys = _split(where)
    k, v, keys = jax.tree.map(gather, (k, v, keys))
    out, _ = block(q, slopes, k, v, {**queries, **keys})
    return out.astype(q.dtype)


def _ring_attention(
    block: Callable[..., Any],
    axes: tuple[str, ...],
    q: Array,
    k: Array,
    v: Array,
    slopes: Array | None,
    where: dict[str, Any],
) -> Array:
    out: Any = _ring(block, axes, q, slopes, (k, v), *_split(where))
    return out.astype(q.dtype)


KINDS: dict[str, Callable[..., Array]] = {"ring": _ring_attention, "all_gather": _all_gather}
"""Name -> how one device's queries meet the keys of the others."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(block: Any, axes: Any, q: Any, slopes: Any, kv: Any, queries: Any, keys: Any) -> Array:
    """Float32 attention of local queries to the keys of all devices, in memory for two parts."""
    return _ring_forward(block, axes, q, slopes, kv, queries, keys)[0]


def _ring_forward(
    block: Any, axes: Any, q: Any, slopes: Any, kv: Any, queries: Any, keys: Any
) -> tuple[Array, tuple[Any, ...]]:
    def attend_to(out: Array, lse: Array, held: Any) -> tuple[Array, Array]:
        part, part_lse = block(q, slopes, *held[0], {**queries, **held[1]})
        return merge([out, part], [lse, part_lse])

    def step(carry: Any, _: None) -> tuple[Any, None]:
        out, lse, held = carry
        return (*attend_to(out, lse, held), _pass_on(held, axes)), None

    empty = jnp.zeros((*q.shape[:-1], kv[1].shape[-1]), jnp.float32)
    start = (empty, jnp.full(empty.shape[:-1], -jnp.inf, jnp.float32), (kv, keys))
    (out, lse, held), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axes) - 1)
    out, lse = attend_to(out, lse, held)
    return out, (q, slopes, kv, queries, keys, out, lse)


def _ring_backward(block: Any, axes: Any, saved: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    """A second trip attends again; the gradients of keys and values travel with them.

    With `w_p = exp(lse_p - lse)`: `d out_p = w_p d out` and `d lse_p = w_p d out . (out_p - out)`.
    """
    q, slopes, kv, queries, keys, out, lse = saved

    def add_gradients(d_own: Any, d_held: Any, held: Any) -> tuple[Any, Any]:
        where = {**queries, **held[1]}
        (part, part_lse), pull = jax.vjp(
            lambda q, slopes, kv: block(q, slopes, *kv, where), q, slopes, held[0]
        )
        seen = jnp.isfinite(part_lse)
        weight = jnp.where(seen, jnp.exp(jnp.where(seen, part_lse - lse, 0.0)), 0.0)
        d_lse = weight * jnp.sum(d_out * (part - out), axis=-1)
        d_q, d_slopes, d_kv = pull((weight[..., None] * d_out, d_lse))
        return _add(d_own, (d_q, d_slopes)), _add(d_held, d_kv)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        d_own, d_held, held = carry
        d_own, d_held = add_gradients(d_own, d_held, held)
        return (d_own, *_pass_on((d_held, held), axes)), None

    start = (_zeros((q, slopes)), _zeros(kv), (kv, keys))
    (d_own, d_held, held), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axes) - 1)
    d_own, d_held = add_gradients(d_own, d_held, held)
    d_kv = _pass_on(d_held, axes)
    cast = functools.partial(jax.tree.map, lambda gradient, array: gradient.astype(array.dtype))
    return *cast(d_own, (q, slopes)), cast(d_kv, kv), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _pass_on(tree: Any, axes: tuple[str, ...]) -> Any:
    size = jax.lax.axis_size(axes)
    ring = [(source, (source + 1) % size) for source in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), tree)


def _split(where: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    queries = {name: value for name, value in where.items() if name.startswith("query")}
    return queries, {name: value for name, value in where.items() if name not in queries}


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, more)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _by_device(q: Array, k: Array, layout: Layout) -> bool:
    """Whether unsplit sequences are divided among the devices here, not by the compiler."""
    if layout.mesh.size == 1 or current_target().platform == "cpu":
        return False
    return _uneven(q, k, layout) is None


def _check(q: Array, k: Array, layout: Layout) -> None:
    problem = _uneven(q, k, layout)
    if problem is not None:
        raise ValueError(f"context attention: {problem}")


def _uneven(q: Array, k: Array, layout: Layout) -> str | None:
    """Which axis does not divide over its devices."""
    sizes = {"batch": q.shape[0], "length": q.shape[1], "heads": q.shape[2]}
    sizes |= {"length of keys": k.shape[1], "kv_heads": k.shape[2]}
    for name, size in sizes.items():
        entry = layout.spec((name.split(" ")[0],))[0]
        pieces = math.prod(layout.mesh.shape[axis] for axis in axis_names(entry))
        if size % pieces:
            return f"{name} of {size} does not divide over {pieces} devices of mesh axis {entry!r}"
    return None
