"""Attention beside JAX's splash attention, forward alone and with all gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_case import Case, Rival
from kernels_pallas.attention import SHAPES, AttentionShape, attention
from kernels_pallas.attention.cost import backward_cost, forward_cost

NAMES = ("gpt2", "llama3_8b", "mistral_7b")


def cases() -> list[Case]:
    """Causal self-attention of whole sequences in bfloat16."""
    found = []
    for name in NAMES:
        shape = SHAPES[name]
        run = functools.partial(forward, window=shape.window)
        library, by_head = splash(shape)
        first, second = forward_cost(shape), backward_cost(shape)
        both = tuple(sum(pair) for pair in zip(first, second, strict=True))
        for label, calls, cost in (
            ("forward", (run, library), first),
            ("with gradients", (gradients(run), gradients(library)), both),
        ):
            rival = Rival("splash_attention", calls[1], by_head)
            made = Case(f"attention {label}, {name}", calls[0], of(shape), *cost, library=rival)
            found.append(made)
    return found


def of(shape: AttentionShape) -> tuple[Any, ...]:
    """q, k, v and positions."""
    q = (shape.batch, shape.queries, shape.heads, shape.head_dim)
    k = (shape.batch, shape.keys, shape.kv_heads, shape.head_dim)
    bfloat16 = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q, k, k))
    return *bfloat16, jax.ShapeDtypeStruct(q[:2], jnp.int32)


def forward(q: Any, k: Any, v: Any, positions: Any, window: int | None = None) -> Any:
    return attention(q, k, v, query_positions=positions, key_positions=positions, window=window)


def gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of the sum of squares of the result, so that nothing is known beforehand."""

    def run(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, *rest, **options), q, k, v)
        return pull(out)

    return run


def splash(shape: AttentionShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The library's kernel over `[batch, kv_heads, group, length, dim]`, with blocks like ours."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    size = (shape.queries, shape.keys)
    mask = masks.CausalMask(size)
    if shape.window is not None:
        mask = masks.LocalMask(size, (shape.window - 1, 0), 0)
    group = shape.heads // shape.kv_heads
    most = {"block_q": 512, "block_kv": 1024, "block_kv_compute": 512}
    most |= {"block_q_dkv": 512, "block_kv_dkv": 1024, "block_kv_dkv_compute": 512}
    most |= {"block_q_dq": 512, "block_kv_dq": 1024}
    kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * group),
        block_sizes=kernels.BlockSizes(**{k: min(v, shape.keys) for k, v in most.items()}),
    )
    q = (shape.batch, shape.kv_heads, group, shape.queries, shape.head_dim)
    k = (shape.batch, shape.kv_heads, shape.keys, shape.head_dim)
    arrays = tuple(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q, k, k))
    return jax.vmap(jax.vmap(kernel)), arrays
