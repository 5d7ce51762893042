"""Attention in plain `jax.numpy`: the definition that every kernel must match, and what runs on a
CPU.

    s_ij = cap(scale * q_i . k_j - slope * |p_i - p_j|)
    lse_i = log sum_j exp(s_ij)
    o_i = sum_j exp(s_ij - lse_i) v_j

over the keys j that query i may see. Softmax is in float32. Query heads that share a key head are
one more axis of the same matrix product, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_positions: Array,
    key_positions: Array,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention over the keys that each query may see (`mask`).

    Args:
        q: `[batch, queries, heads, head_dim]`.
        k: `[batch, keys, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads`.
        v: `[batch, keys, kv_heads, value_dim]`.
        query_positions: `int32[batch, queries]`, absolute positions.
        key_positions: `int32[batch, keys]`.
        query_segment_ids: `int32[batch, queries]`; 0 is padding. None: one document, no padding.
        key_segment_ids: `int32[batch, keys]`.
        causal: keys after the query are hidden.
        window: distances 0..window-1 are seen (the query's own position counts as one).
        sinks: with a window, each query also sees the first `sinks` positions of its document,
            those numbered 0 to sinks-1 (Han et al. 2023, "LM-Infinite").
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)` (Gemma 2).
        alibi_slopes: `[heads]`; `slope * distance` is subtracted from the scores (ALiBi).
        scale: multiplies `q . k`; None is `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        `[batch, queries, heads, value_dim]` in `q.dtype`, and with `return_lse` also
        `float32[batch, queries, heads]`. A query that may see nothing gives 0 and `-inf`, with zero
        gradients.
    """
    check(q, k, v, query_segment_ids, key_segment_ids)
    q = _without_padding(q, query_segment_ids)
    k, v = (_without_padding(x, key_segment_ids) for x in (k, v))
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    factor = head_dim**-0.5 if scale is None else scale
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = factor * jnp.einsum(
        "btkgd,bskd->bktgs", grouped, k, preferred_element_type=jnp.float32
    )
    if alibi_slopes is not None:
        distance = jnp.abs(query_positions[:, :, None] - key_positions[:, None, :])
        slopes = alibi_slopes.astype(jnp.float32).reshape(1, kv_heads, 1, heads // kv_heads, 1)
        scores = scores - slopes * distance[:, None, :, None, :].astype(jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    visible = mask(
        query_positions, key_positions, query_segment_ids, key_segment_ids, causal, window, sinks
    )
    weights, total, lse = _exponentials(scores, visible)
    out = jnp.einsum(
        "bktgs,bskd->bktgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = jnp.swapaxes(out / total, 1, 2)
    out = out.astype(q.dtype).reshape(batch, queries, heads, v.shape[-1])
    if not return_lse:
        return out
    return out, jnp.swapaxes(lse, 1, 2).reshape(batch, queries, heads)


def mask(
    query_positions: Array,
    key_positions: Array,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
) -> Array | None:
    """What each query may see: `bool[batch, queries, keys]`, or None if everything.

    Positions are absolute; segments see only themselves; segment 0 is padding and sees nothing.
    """
    conditions = []
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    if causal:
        conditions.append(distance >= 0)
    if window is not None:
        near = (distance if causal else jnp.abs(distance)) < window
        conditions.append(near | (key_positions < sinks)[:, None, :] if sinks else near)
    if query_segment_ids is not None and key_segment_ids is not None:
        same = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
        conditions.append(same & (query_segment_ids[:, :, None] > 0))
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def merge(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Attention over the union of disjoint key sets, from the attention over each.

    `lse = log sum_p exp(lse_p)`, `out = sum_p exp(lse_p - lse) out_p`; parts that saw nothing (`lse
    = -inf`) add nothing. Takes normalised `[..., dim]` outputs and their `[...]` log-sum-exps.
    """
    stacked = jnp.stack([lse.astype(jnp.float32) for lse in lses])
    peak = jax.lax.stop_gradient(jnp.max(stacked, axis=0))
    shift = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(stacked - shift)
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    parts = [
        weight[..., None] * out.astype(jnp.float32)
        for weight, out in zip(weights, outs, strict=True)
    ]
    out = sum(parts[1:], parts[0]) / safe[..., None]
    return out.astype(outs[0].dtype), jnp.where(seen, jnp.log(safe) + shift, -jnp.inf)


def _without_padding(x: Array, segment_ids: Array | None) -> Array:
    """0 in the place of whatever padding holds: a NaN times a weight of 0 would be one."""
    return x if segment_ids is None else jnp.where(segment_ids[:, :, None, None] > 0, x, 0)


def _exponentials(scores: Array, visible: Array | None) -> tuple[Array, Array, Array]:
    """Softmax before its division, NaN-free for rows that see nothing: weights `[b, k, t, g, s]`
    in [0, 1], their sum `[b, k, t, g, 1]` (1 where nothing is seen), and the log-sum-exp
    `[b, k, t, g]`.
    """
    if visible is not None:
        scores = jnp.where(visible[:, None, :, None, :], scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    return weights, safe, jnp.where(seen, jnp.log(safe) + peak, -jnp.inf)[..., 0]


def check(
    q: Array, k: Array, v: Array, query_segment_ids: Array | None, key_segment_ids: Array | None
) -> None:
    """Raise `ValueError` if the arguments of `attention` do not go together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "attention takes q [batch, queries, heads, dim], k and v [batch, keys, kv_heads, dim]; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids come together or not at all")
