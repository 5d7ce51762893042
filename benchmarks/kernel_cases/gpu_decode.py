"""Decoding on a GPU: attention of the newest tokens to dense caches.

What is beyond a sequence's length is NaN or infinite for the kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_case import HALF, LOG_SUM_EXP, GpuCase, Rival, Speed, normal
from kernels_pallas.decode_attention import (
    IMPLEMENTATIONS,
    SHAPES,
    DecodeShape,
    Unified,
    decode_attention,
)
from kernels_pallas.decode_attention.cost import decode_attention as cost

Array = jax.Array

LAYERS, LAYER = 2, 1
"""Of a cache: more than one, since the wrong layer, or a copy of one, would be a fault."""
GOAL = 0.80
"""Share of the copy bandwidth that decoding is to reach."""
PARTS = (1.0, 0.0, 0.51, 0.03, 0.77, 0.26)
"""Of the slots that sequences use, in turn."""


@dataclass(frozen=True)
class Call:
    """A call that is checked. rolling: the cache is a ring, which sequences have gone round.

    unified: the constants of the heads, in turn; some out of range.
    """

    shape: DecodeShape
    options: dict[str, Any] = field(default_factory=dict)
    alibi: bool = False
    unified: tuple[float, ...] = ()


BASE = DecodeShape(6, 1, 1000, 16, 4, 128)
CHECKED: dict[str, Call] = {
    "one query": Call(BASE),
    "four queries": Call(replace(BASE, queries=4)),
    "every head its own": Call(DecodeShape(6, 1, 520, 8, 8, 128)),
    "one kv head": Call(DecodeShape(6, 1, 520, 32, 1, 64)),
    "long": Call(DecodeShape(1, 1, 16384, 8, 2, 128)),
    "window and sinks": Call(BASE, {"window": 300, "sinks": 5}),
    "ring": Call(replace(BASE, queries=2), {"rolling": True, "window": 700}),
    "soft cap, ALiBi": Call(BASE, {"soft_cap": 20.0}, alibi=True),
    "unified": Call(BASE, unified=(4.0,)),
    "unified, out of range": Call(BASE, unified=(4.0, 120.0, -150.0)),
    "wide heads": Call(DecodeShape(6, 1, 712, 8, 2, 256)),
}
"""Name -> call."""
TIMED = ("llama3_8b", "llama2_7b", "llama3_8b_long", "llama3_8b_verify", "lm_infinite")
SERVED = "gpu" in IMPLEMENTATIONS


def cases(tiny: bool) -> list[GpuCase]:
    """tiny: of sizes that a CPU is done with at once."""
    found = [timed(name, fit(SHAPES[name]) if tiny else SHAPES[name]) for name in TIMED]
    for name, call in CHECKED.items():
        call = replace(call, shape=fit(call.shape)) if tiny else call
        found.append(checked(f"decode, {name}", call))
    return found


def fit(shape: DecodeShape) -> DecodeShape:
    """The same with few and short sequences."""
    heads = 2 * min(shape.heads // shape.kv_heads, 4)
    return replace(shape, batch=min(shape.batch, 3), slots=80, heads=heads, kv_heads=2)


def checked(name: str, call: Call) -> GpuCase:
    """Result and log-sum-exp of sequences of all lengths, one of no token among them."""
    return GpuCase(
        name,
        functools.partial(make, call.shape, call),
        functools.partial(run, call, "gpu"),
        functools.partial(run, call, "plain"),
        (HALF, LOG_SUM_EXP),
        SERVED,
        poison=None if call.options.get("rolling") else poison,
    )


def make(shape: DecodeShape, call: Call, key: Array) -> tuple[Any, ...]:
    """q, k, v, lengths, slopes and constants of the softmax."""
    keys = jax.random.split(key, 4)
    q = normal(keys[0], shape.batch, shape.queries, shape.heads, shape.head_dim)
    size = (LAYERS, shape.batch, shape.kv_heads, shape.slots, shape.head_dim)
    k, v = normal(keys[1], *size), normal(keys[2], *size)
    most = 2 * shape.slots if call.options.get("rolling") else shape.slots
    lengths = jnp.asarray([int(PARTS[i % len(PARTS)] * most) for i in range(shape.batch)])
    slopes = jax.random.uniform(keys[3], (shape.heads,), minval=0.01, maxval=0.1)
    phi = jnp.resize(jnp.asarray(call.unified or (0.0,), jnp.float32), (shape.heads,))
    return q, k, v, lengths.astype(jnp.int32), slopes, phi


def run(
    call: Call,
    implementation: str,
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    slopes: Array,
    phi: Array,
) -> Any:
    """Of the last layer."""
    options = {**call.options, "alibi_slopes": slopes if call.alibi else None, "layer": LAYER}
    options["softmax"] = Unified(phi) if call.unified else "online"
    return decode_attention(
        q, k, v, lengths, return_lse=True, implementation=implementation, **options
    )


def poison(q: Array, k: Array, v: Array, lengths: Array, *rest: Array) -> tuple[Any, ...]:
    """NaN in keys, infinity in values."""
    unused = (jnp.arange(k.shape[3]) >= lengths[:, None])[None, :, None, :, None]
    return q, jnp.where(unused, jnp.nan, k), jnp.where(unused, jnp.inf, v), lengths, *rest


def timed(name: str, shape: DecodeShape) -> GpuCase:
    """All slots in use."""
    seen = shape.slots if shape.window is None else shape.window + shape.sinks
    options = {"window": shape.window, "sinks": shape.sinks, "layer": LAYER}
    kernel, plain = (
        functools.partial(decode_attention, implementation=by, **options) for by in ("gpu", "plain")
    )
    q = jax.ShapeDtypeStruct((shape.batch, shape.queries, shape.heads, shape.head_dim), "bfloat16")
    k = q.update(shape=(shape.batch, shape.kv_heads, shape.slots, shape.head_dim))
    others = (Rival("cuDNN", cudnn, by_token), Rival("PyTorch SDPA", sdpa, by_head, torch=True))
    plain_one = shape.queries == 1 and shape.window is None
    speed = Speed(
        *cost(q, k, k, tokens=shape.batch * seen),
        "copy",
        goal=GOAL if name == "llama3_8b" else None,
        rivals=(*(others if plain_one else ()), Rival("XLA", plain)),
    )
    return GpuCase(
        f"decode, {name}",
        functools.partial(make_timed, shape),
        kernel,
        plain,
        HALF,
        SERVED,
        speed=speed,
    )


def make_timed(shape: DecodeShape, key: Array) -> tuple[Any, ...]:
    """q, k, v and lengths."""
    q, k, v, lengths, *_ = make(shape, Call(shape), key)
    return q, k, v, jnp.full_like(lengths, shape.slots)


def by_token(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, ...]:
    """`[batch, tokens, heads, dim]`, of one layer."""
    return (q, *(jnp.swapaxes(x[LAYER], 1, 2) for x in (k, v)), lengths)


def cudnn(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Through JAX."""
    attend: Any = jax.nn.dot_product_attention
    return attend(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def by_head(q: Array, k: Array, v: Array, _: Array) -> tuple[Array, ...]:
    """`[batch, heads, tokens, dim]`, of one layer."""
    return jnp.swapaxes(q, 1, 2), k[LAYER], v[LAYER]


def sdpa(q: Any, k: Any, v: Any) -> Any:
    """Of torch tensors, all slots."""
    import torch

    attend: Any = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
