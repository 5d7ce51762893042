"""The forward kernel of flash attention for TPUs (Dao et al. 2022, "FlashAttention"; Dao 2023).

A grid step is one visited pair of blocks (`visits`): the query heads that share a key head, `heads`
of them times `queries` rows, against `keys` keys. Output, running maximum and running sum stay in
vector memory while a row of blocks is visited. Logits are in base 2, so that the exponential is the
hardware's; the running sum is kept in 128 lanes and reduced once at the end.

Scalars a row are stored along lanes (`[heads, queries]`, no padding in HBM) and turned into columns
in vector memory, once a row of blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.scores import LOG2E, NOTHING, Rules, logits, visible
from kernels_pallas.attention.visits import FULL, PARTIAL, decode

Array = jax.Array

LANES = 128


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of one kernel.

    heads: query heads of a step, a divisor of those that share a key head.
    queries, keys: tokens of a step; multiples of 128.
    keys_at_once: keys of one product; divides `keys`.
    """

    heads: int
    queries: int
    keys: int
    keys_at_once: int


@dataclass(frozen=True)
class Call:
    """Everything about a kernel call that is known before tracing."""

    rules: Rules
    blocks: Blocks
    vmem_limit: int | None
    interpret: Any


def forward(
    call: Call, codes: Array, steps: Array, slopes: Array, where: tuple[Array, Array], q: Array,
    k: Array, v: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Attention of blocks of heads.

    Args:
        call: static.
        codes, steps: of `visits`, rows are blocks of queries; codes flat.
        slopes: `float32[batch * query heads]`.
        where: `int32[batch, 2, queries]` and `int32[batch, 2, keys]`, positions and segments.
        q: `[batch, kv_heads, blocks of heads, heads of a block, queries, head_dim]`.
        k: `[batch, kv_heads, keys, head_dim]`.
        v: `[batch, kv_heads, keys, value_dim]`.

    Returns out, like q with `value_dim`, and the log-sum-exp, float32, like q without `head_dim`.
    """
    specs = Specs(call.blocks, codes.shape[0] // q.shape[0])
    rows, value_dim = (call.blocks.heads, call.blocks.queries), v.shape[-1]
    return pl.pallas_call(
        functools.partial(_kernel, call, specs.visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*q.shape[:3], steps),
            in_specs=[
                *specs.places(),
                specs.rows(q.shape[-1]),
                specs.keys(k.shape[-1]),
                specs.keys(value_dim),
            ],
            out_specs=[specs.rows(value_dim), specs.rows()],
            scratch_shapes=[
                pltpu.VMEM((*rows, value_dim), jnp.float32),
                pltpu.VMEM((*rows, LANES), jnp.float32),
                pltpu.VMEM((*rows, LANES), jnp.float32),
                pltpu.VMEM((2, call.blocks.queries, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:-1], value_dim), q.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=call.vmem_limit,
        ),
        cost_estimate=estimate(call.rules, 2, q, k, v),
        interpret=call.interpret,
        name="attention_forward",
    )(codes, slopes, *where, q, k, v)


def estimate(rules: Rules, products: int, q: Array, k: Array, v: Array) -> pl.CostEstimate:
    """What the compiler is told: work as if the last query were at the last key and all tokens of
    one document; arguments and results once each.
    """
    queries, keys = q.shape[4], k.shape[2]
    seen = keys - queries / 2 if rules.causal else keys
    if rules.window is not None:
        seen = min(seen, rules.window + rules.sinks)
    pairs = q.size // q.shape[-1] * max(seen, 1)
    return pl.CostEstimate(
        flops=int(products * pairs * (q.shape[-1] + v.shape[-1])),
        bytes_accessed=2 * (q.nbytes + k.nbytes + v.nbytes) * products // 2,
        transcendentals=int(pairs),
    )


@dataclass(frozen=True)
class Specs:
    """The blocks of a grid step `(batch, key head, block of heads, visit)`."""

    blocks: Blocks
    visits: int

    def _visited(self, b: Any, s: Any, codes: Any) -> tuple[Any, Any]:
        return decode(codes[b * self.visits + s])[:2]

    def places(self) -> list[pl.BlockSpec]:
        """Positions and segments of queries and of keys."""
        return [
            pl.BlockSpec(
                (1, 2, self.blocks.queries),
                lambda b, n, r, s, c, _: (b, 0, self._visited(b, s, c)[0]),
            ),
            pl.BlockSpec(
                (1, 2, self.blocks.keys), lambda b, n, r, s, c, _: (b, 0, self._visited(b, s, c)[1])
            ),
        ]

    def rows(self, *dim: int) -> pl.BlockSpec:
        """Vectors of `dim`, or scalars, of the queries."""
        return pl.BlockSpec(
            (None, None, None, self.blocks.heads, self.blocks.queries, *dim),
            lambda b, n, r, s, c, _: (b, n, r, 0, self._visited(b, s, c)[0], *(0 for _ in dim)),
        )

    def keys(self, dim: int) -> pl.BlockSpec:
        """Vectors of the keys."""
        return pl.BlockSpec(
            (None, None, self.blocks.keys, dim),
            lambda b, n, r, s, c, _: (b, n, self._visited(b, s, c)[1], 0),
        )


def visit(call: Call, visits: int, codes: Any, slopes: Any) -> tuple[Any, Any]:
    """What `decode` says of this grid step, and a function from a head of it to its slope."""
    b, s = pl.program_id(0), pl.program_id(3)
    block = (b * pl.num_programs(1) + pl.program_id(1)) * pl.num_programs(2) + pl.program_id(2)
    return decode(codes[b * visits + s]), lambda g: slopes[block * call.blocks.heads + g]


def _kernel(
    call: Call, visits: int, codes: Any, slopes: Any, rows: Any, columns: Any, q: Any, k: Any,
    v: Any, out: Any, lse: Any, total: Any, peak: Any, weight: Any, row_columns: Any,
) -> None:  # fmt: skip
    (_, _, kind, first, last), slope_of = visit(call, visits, codes, slopes)
    heads, at_once = call.blocks.heads, call.blocks.keys_at_once

    @pl.when(first)
    def _start() -> None:
        total[...] = jnp.zeros_like(total)
        weight[...] = jnp.zeros_like(weight)
        peak[...] = jnp.full_like(peak, NOTHING)
        for i in range(2):
            row_columns[i] = column(rows[0, i : i + 1])

    def add(masked: bool) -> None:
        @pl.loop(0, heads)
        def _head(g: Any) -> None:
            for start in range(0, call.blocks.keys, at_once):
                here = pl.ds(start, at_once)
                places = (row_columns[0], row_columns[1], columns[0, :, here])
                shaped = _logits(call.rules, q[g], k[here], slope_of(g), places, masked)
                _accumulate(shaped, v[here], g, total, peak, weight)

    pl.when(kind == PARTIAL)(lambda: add(True))
    pl.when(kind == FULL)(lambda: add(False))

    @pl.when(last)
    def _finish() -> None:
        for g in range(heads):
            seen = peak[g] > NOTHING / 2
            sums = jnp.broadcast_to(jnp.sum(weight[g], axis=1, keepdims=True), seen.shape)
            share = wide(jnp.where(seen, 1 / sums, 0.0), total.shape[-1])
            out[g] = (total[g] * share).astype(out.dtype)
            lse[g : g + 1] = _log_sum_exp(peak[g], sums)


def _log_sum_exp(peak: Array, sums: Array) -> Array:
    """`[1, n]` of what is `[n, 128]`, the same in every lane; both are turned at once."""
    lane = jax.lax.broadcasted_iota(jnp.int32, peak.shape, 1)
    turned = jnp.where(lane == 0, peak, sums).T
    seen = turned[:1] > NOTHING / 2
    safe = jnp.where(seen, turned[1:2], 1.0)
    return jnp.where(seen, jnp.log(safe) + turned[:1] / LOG2E, -jnp.inf)


def _logits(
    rules: Rules, q: Array, k: Array, slope: Array, places: tuple[Array, ...], masked: bool
) -> Array:
    """Base-2 logits `[queries, keys]` of one head."""
    scores = product(q, k, 1, 1)
    rows, row_segments, keys = places
    distance = None
    if masked or rules.alibi:
        distance = wide(rows, scores.shape[1]) - keys[:1]
    shaped, _ = logits(rules, scores, distance, slope)
    if not masked or distance is None:
        return shaped
    same = wide(row_segments, scores.shape[1]) == keys[1:]
    return jnp.where(visible(rules, distance, keys[:1], same), shaped, NOTHING)


def _accumulate(shaped: Array, v: Array, g: Any, total: Any, peak: Any, weight: Any) -> None:
    """One step of the running softmax of head g."""
    before = peak[g]
    now = jnp.maximum(before, jnp.max(shaped, axis=1, keepdims=True))
    weights = jnp.exp2(shaped - wide(now, shaped.shape[1]))
    shrink = jnp.exp2(before - now)
    lanes = [weights[:, i : i + LANES] for i in range(0, shaped.shape[1], LANES)]
    peak[g] = now
    weight[g] = weight[g] * shrink + sum(lanes[1:], lanes[0])
    total[g] = total[g] * wide(shrink, total.shape[-1]) + product(weights.astype(v.dtype), v, 1, 0)


def product(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Matrix product in float32, summed over one axis of each."""
    axes = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def column(row: Array) -> Array:
    """`[1, n] -> [n, 128]`, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def wide(x: Array, width: int) -> Array:
    """`[n, 128]`, the same in every lane, as `[n, width]`."""
    if width <= LANES:
        return x[:, :width]
    tiled = jnp.tile(x, (1, pl.cdiv(width, LANES)))
    return tiled if width % LANES == 0 else tiled[:, :width]
