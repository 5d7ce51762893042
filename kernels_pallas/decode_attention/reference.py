"""Decode attention in plain `jax.numpy`: the definition that every kernel must match, and what runs
on a CPU.

The last few tokens of each sequence attend to its cache, of which the first `lengths` slots are in
use. With `rolling`, the cache is a ring: slot s holds the newest position p with `p % slots == s`.

    s_ij = cap(scale * q_i . k_j - slope * (p_i - p_j))
    lse_i = log sum_j exp(s_ij)
    o_i = sum_j exp(s_ij - lse_i) v_j

over the keys j at positions `p_j <= p_i` and `p_j > p_i - window`, or `p_j < sinks`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.softmax import Softmax, Unified, check_softmax, exponentials

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    layer: Any = None,
    window: int | None = None,
    sinks: int = 0,
    rolling: bool = False,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
) -> Any:
    """Attention of the newest tokens of each sequence to its cache.

    Args:
        q: `[batch, queries, heads, head_dim]`, the last tokens of each sequence, in order; usually
            one. `heads` must be a multiple of `kv_heads`; the heads of a kv head are neighbours.
        k: `[batch, kv_heads, slots, head_dim]`, or with a leading layer axis. What lies beyond
            `lengths` is never read, NaN included.
        v: like k, with a `value_dim`.
        lengths: `int32[batch]`, tokens that each sequence has, the queries among them; with
            `rolling` they may be more than the slots.
        layer: the layer of k and v, an int or `int32[]`; None if they have no such axis.
        window: distances 0..window-1 are seen.
        sinks: so many of the first tokens are seen from any distance.
        rolling: the cache is a ring. Its sinks are overwritten, so they cannot be asked for.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        alibi_slopes: `[heads]`; `slope * distance` is subtracted from the scores.
        scale: multiplies `q . k`; None is `head_dim ** -0.5`.
        softmax: "online" or `Unified`.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        `[batch, queries, heads, value_dim]` in `q.dtype`, and with `return_lse` also
        `float32[batch, queries, heads]`. A query that may see nothing gives 0 and `-inf`.
    """
    check(q, k, v, lengths, layer, sinks, rolling, softmax)
    if layer is not None:
        k, v = k[layer], v[layer]
    slots, queries = k.shape[2], q.shape[1]
    used = jnp.arange(slots, dtype=jnp.int32) < jnp.minimum(lengths, slots)[:, None]
    key_positions = positions(lengths, slots, rolling)
    query_positions = (lengths[:, None] - queries) + jnp.arange(queries, dtype=jnp.int32)
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    out, lse = attend(
        q,
        k,
        jnp.where(used[:, None, :, None], v, 0),
        distance,
        see(distance, key_positions[:, None, :], window, sinks) & used[:, None, :],
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        scale=scale,
        softmax=softmax,
    )
    return (out, lse) if return_lse else out


def attend(
    q: Array,
    k: Array,
    v: Array,
    distance: Array,
    visible: Array,
    *,
    soft_cap: float | None,
    alibi_slopes: Array | None,
    scale: float | None,
    softmax: Softmax,
) -> tuple[Array, Array]:
    """q `[batch, queries, heads, dim]` to k and v `[batch, kv_heads, keys, dim]`, where `visible`
    (`[batch, queries, keys]`, as `distance`); v must be finite everywhere.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    # Queries and heads of a group as one dimension: a CPU takes twice as long for two.
    rows = jnp.swapaxes(q.reshape(batch, queries, kv_heads, group, head_dim), 1, 2)
    rows = rows.reshape(batch, kv_heads, queries * group, head_dim)
    scores = jnp.einsum("bkrd,bksd->bkrs", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, queries, group, k.shape[2])
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    per_head = (kv_heads, 1, group, 1)
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(per_head)
        scores = scores - slopes * distance[:, None, :, None, :].astype(jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    phi = softmax.phi.reshape(per_head) if isinstance(softmax, Unified) else None
    weights, total, lse = exponentials(scores, visible[:, None, :, None, :], softmax, phi)
    weights = weights.reshape(*rows.shape[:3], k.shape[2]).astype(v.dtype)
    out = jnp.einsum("bkrs,bksd->bkrd", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, queries, group, v.shape[-1])
    out = jnp.swapaxes(out / total, 1, 2).astype(q.dtype)
    lse = jnp.swapaxes(lse[..., 0], 1, 2).reshape(batch, queries, heads)
    return out.reshape(batch, queries, heads, v.shape[-1]), lse


def positions(lengths: Array, slots: int, rolling: bool) -> Array:
    """Position of the token in each slot, `int32[batch, slots]` (or `[1, slots]`); negative where a
    ring holds none yet.
    """
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    if not rolling:
        return slot
    last = lengths[:, None] - 1
    return last - (last - slot) % slots


def see(distance: Array, key_positions: Array, window: int | None, sinks: int) -> Array:
    """Whether a query may see a key: `distance` is the query's position minus the key's."""
    near = distance >= 0
    if window is not None:
        near = near & ((distance < window) | (key_positions < sinks))
    return near & (key_positions >= 0)


def check(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    layer: Any,
    sinks: int,
    rolling: bool,
    softmax: Softmax,
) -> None:
    """Raises `ValueError` that names the argument and what would be right."""
    lead = 0 if layer is None else 1
    if q.ndim != 4 or k.ndim != 4 + lead or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            "decode_attention takes q [batch, queries, heads, dim], k and v [batch, kv_heads, "
            f"slots, dim]{', with a leading layer axis' if lead else ''}; got q {q.shape}, "
            f"k {k.shape}, v {v.shape}, layer {'None' if layer is None else 'given'}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[lead] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and lengths {lengths.shape} disagree in batch or head_dim"
        )
    if q.shape[2] % k.shape[lead + 1]:
        raise ValueError(
            f"{q.shape[2]} query heads are not a multiple of {k.shape[lead + 1]} kv heads"
        )
    if rolling and sinks:
        raise ValueError(f"sinks={sinks} with rolling=True: a ring overwrites its first tokens")
    check_softmax(softmax, q.shape[2])
