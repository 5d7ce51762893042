"""The backward kernel of flash attention for TPUs: gradients of queries, keys, values and slopes in
one pass, with one recomputation of the scores.

    P = exp(S - lse)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K
    dK = scale dS^T Q   delta_i = sum_d dO_id O_id - dlse_i

Blocks are visited row by row as in the forward kernel (`visits`). The gradients of all keys and
values of a key head stay in vector memory, in float32, while all its queries pass: five products a
pair of blocks instead of the seven of two kernels, and no partial sums in HBM. Scores are computed
transposed, `[keys, queries]`, so that what belongs to a query lies along lanes as it is stored.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.scores import Rules, logits, visible
from kernels_pallas.attention.tpu_forward import (
    Call,
    Specs,
    column,
    estimate,
    product,
    visit,
    wide,
)
from kernels_pallas.attention.visits import FULL, PARTIAL

Array = jax.Array


def backward(
    call: Call, codes: Array, steps: Array, slopes: Array, where: tuple[Array, Array], q: Array,
    k: Array, v: Array, d_out: Array, lse: Array, delta: Array,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Gradients of `forward`, with its arguments.

    Args:
        d_out: like out.
        lse: like the log-sum-exp but in base 2, large and positive for a query that sees nothing.
        delta: like lse; the sum of `d_out * out` less the gradient of the log-sum-exp.

    Returns, all float32: d_q like q, d_k like k and d_v like v, d_k still without `scale`, and of
    each query its share of the slope's gradient, like lse.
    """
    specs = Specs(call.blocks, codes.shape[0] // q.shape[0])
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    return pl.pallas_call(
        functools.partial(_kernel, call, specs.visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*q.shape[:3], steps),
            in_specs=[
                *specs.places(),
                specs.rows(head_dim),
                specs.keys(head_dim),
                specs.keys(value_dim),
                specs.rows(value_dim),
                specs.rows(),
                specs.rows(),
            ],
            out_specs=[
                specs.rows(head_dim),
                *(
                    pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n, *_: (b, n, 0, 0))
                    for x in (k, v)
                ),
                specs.rows(),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v, lse)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=call.vmem_limit,
        ),
        cost_estimate=estimate(call.rules, 5, q, k, v),
        interpret=call.interpret,
        name="attention_backward",
    )(codes, slopes, *where, q, k, v, d_out, lse, delta)


def _kernel(
    call: Call, visits: int, codes: Any, slopes: Any, rows: Any, columns: Any, q: Any, k: Any,
    v: Any, d_out: Any, lse: Any, delta: Any, d_q: Any, d_k: Any, d_v: Any, d_slope: Any,
) -> None:  # fmt: skip
    (_, minor, kind, first, last), slope_of = visit(call, visits, codes, slopes)
    rules, blocks = call.rules, call.blocks

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _start() -> None:
        d_k[...] = jnp.zeros_like(d_k)
        d_v[...] = jnp.zeros_like(d_v)

    @pl.when(first)
    def _start_row() -> None:
        d_q[...] = jnp.zeros_like(d_q)
        d_slope[...] = jnp.zeros_like(d_slope)

    def add(masked: bool) -> None:
        @pl.loop(0, blocks.heads)
        def _head(g: Any) -> None:
            one, q_g, d_out_g = pl.ds(g, 1), q[g], d_out[g]
            for start in range(0, blocks.keys, blocks.keys_at_once):
                here = pl.ds(start, blocks.keys_at_once)
                there = pl.ds(minor * blocks.keys + start, blocks.keys_at_once)
                k_part, places = k[here], (rows[0], columns[0, :, here])
                weights, bend, distance = _weights(
                    rules, k_part, q_g, lse[one], slope_of(g), places, masked
                )
                d_v[there] += product(weights.astype(d_out.dtype), d_out_g, 1, 0)
                d_scores = weights * (product(v[here], d_out_g, 1, 1) - delta[one])
                if bend is not None:
                    d_scores *= bend
                if distance is not None and rules.alibi:
                    share = d_scores * jnp.abs(distance).astype(jnp.float32)
                    d_slope[one] -= jnp.sum(share, axis=0, keepdims=True)
                d_scores = d_scores.astype(q.dtype)
                d_k[there] += product(d_scores, q_g, 1, 0)
                d_q[g] += product(d_scores, k_part, 0, 0)

    pl.when(kind == PARTIAL)(lambda: add(True))
    pl.when(kind == FULL)(lambda: add(False))

    @pl.when(last)
    def _finish_row() -> None:
        d_q[...] *= rules.scale


def _weights(
    rules: Rules, k: Array, q: Array, lse: Array, slope: Array, places: tuple[Array, Array],
    masked: bool,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """Softmax weights `[keys, queries]` of one head, with the derivative of the soft cap and the
    distances where there are any.
    """
    scores = product(k, q, 1, 1)
    queries, keys = places
    distance = None
    if masked or rules.alibi:
        key_positions = wide(column(keys[:1]), scores.shape[1])
        distance = queries[:1] - key_positions
    shaped, bend = logits(rules, scores, distance, slope)
    weights = jnp.exp2(shaped - lse)
    if masked and distance is not None:
        same = queries[1:] == wide(column(keys[1:]), scores.shape[1])
        seen = visible(rules, distance, key_positions, same)
        weights = jnp.where(seen, weights, 0.0)
    return weights, bend, distance
