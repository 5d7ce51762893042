"""Flash attention in plain `jax.numpy`: the same running softmax and recomputation as the kernels,
in memory for one block of scores at a time.

It is what runs where scores of the whole sequence do not fit and no kernel serves: other platforms,
unusual types, and programs that the compiler partitions itself. Blocks in which nothing may be seen
are skipped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.scores import LOG2E, NOTHING, Rules, logits, visible
from kernels_pallas.attention.visits import HIDDEN, block_kinds

Array = jax.Array


@dataclass(frozen=True)
class Chunked:
    """Blocks of `rows` queries by `columns` keys; `flash.Engine` says what the methods take."""

    heads: int
    rows: int
    columns: int
    platform: str | None = None

    def forward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """See `flash.Engine`."""
        keys = tuple(_cut(x, 2, self.columns) for x in (k, v, key_places))

        def row(queries: Any) -> tuple[Array, Array]:
            q, places, seen = queries

            def step(carry: Any, block: Any) -> tuple[Any, None]:
                *parts, seen = block
                add = functools.partial(_accumulate, rules, q, slopes, places, *parts)
                return jax.lax.cond(seen, add, lambda carry: carry, carry), None

            lines = jnp.zeros(q.shape[:-1], jnp.float32)
            start = (jnp.zeros((*lines.shape, v.shape[-1]), jnp.float32), lines + NOTHING, lines)
            (total, peak, weight), _ = jax.lax.scan(step, start, (*keys, seen))
            seen = peak > NOTHING / 2
            safe = jnp.where(seen, weight, 1.0)
            out = jnp.where(seen, 1 / safe, 0.0)[..., None] * total
            return out.astype(q.dtype), jnp.where(seen, jnp.log(safe) + peak / LOG2E, -jnp.inf)

        seen = self._seen(rules, query_places, key_places)
        queries = (_cut(q, 4, self.rows), _cut(query_places, 2, self.rows), seen)
        out, lse = jax.lax.map(row, queries)
        return _joined(out, 4), _joined(lse, 4)

    def backward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array, d_out: Array, lse: Array, delta: Array,
    ) -> tuple[Array, Array, Array, Array]:  # fmt: skip
        """See `flash.Engine`."""
        keys = tuple(_cut(x, 2, self.columns) for x in (k, v, key_places))

        def row(d_keys: Any, queries: Any) -> tuple[Any, Any]:
            *queries, seen = queries

            def step(carry: Any, block: Any) -> tuple[Any, Any]:
                parts, d_parts, seen = block
                add = functools.partial(_add_gradients, rules, slopes, queries, parts)
                return jax.lax.cond(seen, add, lambda *same: same, carry, d_parts)

            q, _, _, lse, _ = queries
            start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(lse.shape, jnp.float32))
            (d_q, d_slopes), d_keys = jax.lax.scan(step, start, (keys, d_keys, seen))
            return d_keys, (d_q, d_slopes)

        start = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
        queries = tuple(_cut(x, 4, self.rows) for x in (q, d_out, lse, delta))
        queries = (queries[0], _cut(query_places, 2, self.rows), *queries[1:])
        seen = self._seen(rules, query_places, key_places)
        (d_k, d_v), (d_q, d_slopes) = jax.lax.scan(row, start, (*queries, seen))
        return _joined(d_q, 4), _joined(d_k, 2), _joined(d_v, 2), _joined(d_slopes, 4)

    def _seen(self, rules: Rules, query_places: Array, key_places: Array) -> Array:
        """`bool[query blocks, key blocks]`."""
        kinds = block_kinds(rules, query_places, key_places, self.rows, self.columns)
        return jnp.any(kinds > HIDDEN, axis=0)


def _accumulate(
    rules: Rules, q: Array, slopes: Array, places: Array, k: Array, v: Array, key_places: Array,
    carry: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:  # fmt: skip
    """One step of the running softmax."""
    total, peak, weight = carry
    scores, seen, _, _ = _scores(rules, q, k, slopes, places, key_places)
    scores = jnp.where(seen, scores, NOTHING)
    now = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.exp2(scores - now[..., None])
    shrink = jnp.exp2(peak - now)
    total = total * shrink[..., None] + _sum("bkrgts,bksd->bkrgtd", weights.astype(v.dtype), v)
    return total, now, weight * shrink + jnp.sum(weights, axis=-1)


def _add_gradients(
    rules: Rules, slopes: Array, queries: Any, keys: Any, d_queries: Any, d_keys: Any
) -> tuple[Any, Any]:
    """The share of one block in all gradients."""
    (q, places, d_out, lse, delta), (k, v, key_places) = queries, keys
    (d_q, d_slopes), (d_k, d_v) = d_queries, d_keys
    scores, seen, bend, distance = _scores(rules, q, k, slopes, places, key_places)
    weights = jnp.where(seen, jnp.exp2(scores - lse[..., None]), 0.0)
    d_v += _sum("bkrgts,bkrgtd->bksd", weights.astype(v.dtype), d_out)
    d_scores = weights * (_sum("bkrgtd,bksd->bkrgts", d_out, v) - delta[..., None])
    if bend is not None:
        d_scores *= bend
    if rules.alibi:
        d_slopes -= jnp.sum(d_scores * jnp.abs(distance), axis=-1)
    d_scores = (d_scores * rules.scale).astype(q.dtype)
    d_q += _sum("bkrgts,bksd->bkrgtd", d_scores, k)
    d_k += _sum("bkrgts,bkrgtd->bksd", d_scores, q)
    return (d_q, d_slopes), (d_k, d_v)


def _scores(
    rules: Rules, q: Array, k: Array, slopes: Array, places: Array, key_places: Array
) -> tuple[Array, Array, Array | None, Array]:
    """Base-2 logits `[b, k, r, g, t, s]`, what may be seen, the cap's derivative, distances."""
    rows, columns = places[:, :, :, None], key_places[:, :, None, :]
    distance = (rows[:, 0] - columns[:, 0])[:, None, None, None]
    seen = visible(
        rules, distance, columns[:, 0][:, None, None, None],
        (rows[:, 1] == columns[:, 1])[:, None, None, None],
    )  # fmt: skip
    scores = _sum("bkrgtd,bksd->bkrgts", q, k)
    shaped, bend = logits(rules, scores, distance, slopes[..., None, None])
    return shaped, seen, bend, distance


def _sum(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _cut(x: Array, axis: int, size: int) -> Array:
    """Blocks of an axis, in front."""
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: Array, axis: int) -> Array:
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
