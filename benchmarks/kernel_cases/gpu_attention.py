"""Attention of whole sequences on a GPU: every mask in small, forward and backward, and published
models' calls in time beside cuDNN, PyTorch and tokamax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_case import GRADIENTS, HALF, LOG_SUM_EXP, GpuCase, Rival, Speed, normal
from benchmarks.kernel_cases.attention import gradients
from kernels_pallas.attention import IMPLEMENTATIONS, SHAPES, AttentionShape, attention
from kernels_pallas.attention.cost import backward_cost, forward_cost

Array = jax.Array

KERNEL = "gpu" if "gpu" in IMPLEMENTATIONS else "hopper"
SEGMENTS = (1, 2, 3, 0)
"""Documents of a packed row, the last of it padding."""


@dataclass(frozen=True)
class Call:
    """A call that is checked, with all its gradients.

    shape: the last query is at the last key. options: of `attention`. packed: rows hold documents
    and padding. alibi: with slopes.
    """

    shape: AttentionShape
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    alibi: bool = False


CHECKED: dict[str, Call] = {
    "causal": Call(AttentionShape(2, 1024, 1024, 8, 2, 128)),
    "ragged": Call(AttentionShape(1, 777, 777, 4, 4, 64)),
    "one block": Call(AttentionShape(1, 33, 33, 2, 1, 128)),
    "packed": Call(AttentionShape(2, 900, 900, 8, 2, 128), packed=True),
    "window": Call(AttentionShape(1, 1024, 1024, 8, 2, 128), {"window": 200}),
    "sinks": Call(AttentionShape(1, 1000, 1000, 8, 2, 128), {"window": 150, "sinks": 4}),
    "soft cap": Call(AttentionShape(1, 640, 640, 8, 4, 128), {"soft_cap": 20.0}),
    "ALiBi": Call(AttentionShape(1, 640, 640, 8, 8, 64), alibi=True),
    "bidirectional": Call(AttentionShape(2, 500, 500, 4, 2, 64), {"causal": False}),
    "chunk": Call(AttentionShape(2, 200, 900, 8, 2, 128)),
    "wide heads": Call(AttentionShape(1, 400, 400, 4, 1, 256)),
    "odd heads": Call(AttentionShape(1, 300, 300, 4, 2, 80)),
    "everything": Call(
        AttentionShape(2, 700, 700, 8, 2, 128),
        {"window": 120, "sinks": 3, "soft_cap": 30.0},
        packed=True,
        alibi=True,
    ),
}
"""Name -> call."""
GOALS = {"llama3_8b": (0.70, 0.55)}
"""Shape -> shares of the matmul ceiling asked of the forward and of the backward pass."""
TIMED = ("llama3_8b", "mistral_7b", "gpt2")


def cases(tiny: bool) -> list[GpuCase]:
    """tiny: of sizes that a CPU is done with at once."""
    found = [
        case for name in TIMED for case in timed(name, fit(SHAPES[name]) if tiny else SHAPES[name])
    ]
    for name, call in CHECKED.items():
        call = replace(call, shape=fit(call.shape)) if tiny else call
        found.append(checked(f"attention, {name}", call))
    return found


def fit(shape: AttentionShape) -> AttentionShape:
    """The same with few tokens, and as many queries fewer than keys."""
    keys = min(shape.keys, 96)
    queries = keys if shape.queries == shape.keys else keys // 2
    heads = 2 * (shape.heads // shape.kv_heads)
    return replace(shape, batch=1, queries=queries, keys=keys, heads=heads, kv_heads=2)


def checked(name: str, call: Call) -> GpuCase:
    """Results, log-sum-exps and gradients, of random cotangents of both."""
    gradient = (GRADIENTS,) * (4 if call.alibi else 3)
    return GpuCase(
        name,
        functools.partial(make_checked, call),
        functools.partial(with_gradients, call, KERNEL),
        functools.partial(with_gradients, call, "plain"),
        (HALF, LOG_SUM_EXP, *gradient),
        KERNEL in IMPLEMENTATIONS,
        poison=poison if call.packed else None,
    )


def make_checked(call: Call, key: Array) -> tuple[Any, ...]:
    """What is differentiated, the cotangents, and where the tokens are."""
    s, keys = call.shape, jax.random.split(key, 6)
    q = normal(keys[0], s.batch, s.queries, s.heads, s.head_dim)
    k, v = (normal(one, s.batch, s.keys, s.kv_heads, s.head_dim) for one in keys[1:3])
    slopes = jax.random.uniform(keys[3], (s.heads,), minval=0.01, maxval=0.1)
    cotangents = normal(keys[4], *q.shape), normal(keys[5], *q.shape[:3], dtype=jnp.float32)
    places = jnp.broadcast_to(jnp.arange(s.keys, dtype=jnp.int32), (s.batch, s.keys))
    where = {"query_positions": places[:, s.keys - s.queries :], "key_positions": places}
    if call.packed:
        ids = jnp.asarray(SEGMENTS, jnp.int32)[places * len(SEGMENTS) // s.keys]
        where |= {"query_segment_ids": ids, "key_segment_ids": ids}
    return (q, k, v, *((slopes,) if call.alibi else ())), cotangents, where


def with_gradients(
    call: Call, implementation: str, inputs: Any, cotangents: Any, where: Any
) -> Any:
    """Output, log-sum-exp, and the gradients of `inputs`."""

    def run(q: Array, k: Array, v: Array, slopes: Array | None = None) -> Any:
        options = {**call.options, "alibi_slopes": slopes, "implementation": implementation}
        return attention(q, k, v, return_lse=True, **where, **options)

    (out, lse), pull = jax.vjp(run, *inputs)
    return out, lse, *pull((cotangents[0].astype(out.dtype), cotangents[1]))


def poison(inputs: Any, cotangents: Any, where: Any) -> tuple[Any, ...]:
    """Padding is NaN in queries, keys and values."""
    padding = (where["key_segment_ids"] == 0)[..., None, None]
    poisoned = tuple(jnp.where(padding, jnp.nan, x) for x in inputs[:3])
    return (*poisoned, *inputs[3:]), cotangents, where


def timed(name: str, shape: AttentionShape) -> tuple[GpuCase, GpuCase]:
    """The forward pass, and the backward pass as what gradients take longer; causal."""
    goals = GOALS.get(name, (None, None))
    options = {"window": shape.window}
    run, plain = (
        functools.partial(forward, implementation=by, **options) for by in (KERNEL, "chunked")
    )
    forward_speed = Speed(
        *forward_cost(shape), "bfloat16", goals[0], rivals=tuple(rivals(shape, plain))
    )
    backward_speed = replace(
        forward_speed,
        **dict(zip(("flops", "bytes"), backward_cost(shape), strict=True)),
        goal=goals[1],
        less=run,
        rivals=tuple(backward(rival) for rival in forward_speed.rivals),
    )
    make, served = functools.partial(make_timed, shape), KERNEL in IMPLEMENTATIONS
    return (
        GpuCase(f"attention forward, {name}", make, run, plain, HALF, served, speed=forward_speed),
        GpuCase(
            f"attention backward, {name}",
            make,
            gradients(run),
            gradients(plain),
            GRADIENTS,
            served,
            speed=backward_speed,
        ),
    )


def make_timed(shape: AttentionShape, key: Array) -> tuple[Any, ...]:
    """q, k, v and positions."""
    (q, k, v), _, where = make_checked(Call(shape), key)
    return q, k, v, where["key_positions"]


def forward(q: Array, k: Array, v: Array, positions: Array, **options: Any) -> Array:
    """As a training step calls it."""
    return attention(q, k, v, query_positions=positions, key_positions=positions, **options)


def rivals(shape: AttentionShape, plain: Callable[..., Any]) -> list[Rival]:
    """PyTorch's has no windows without a mask in memory, so there it is left out."""
    window = None if shape.window is None else (shape.window - 1, 0)
    found = [Rival("cuDNN", functools.partial(cudnn, window=window))]
    if window is None:
        found.append(Rival("PyTorch SDPA", sdpa, by_head, torch=True))
    found.append(Rival("tokamax", functools.partial(tokamax, window=window)))
    return [*found, Rival("XLA", plain)]


def backward(rival: Rival) -> Rival:
    """Its gradients less its forward pass."""
    whole = sdpa_gradients if rival.torch else gradients(rival.function)
    return replace(rival, function=whole, less=rival.function)


def cudnn(q: Array, k: Array, v: Array, _: Array, window: tuple[int, int] | None) -> Array:
    """Through JAX."""
    attend: Any = jax.nn.dot_product_attention
    return attend(q, k, v, is_causal=True, local_window_size=window, implementation="cudnn")


def tokamax(q: Array, k: Array, v: Array, _: Array, window: tuple[int, int] | None) -> Array:
    """Its own choice of kernel."""
    import tokamax as library  # pyright: ignore

    return library.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)


def by_head(q: Array, k: Array, v: Array, _: Array) -> tuple[Array, ...]:
    """`[batch, heads, tokens, dim]`."""
    return tuple(jnp.swapaxes(x, 1, 2) for x in (q, k, v))


def sdpa(q: Any, k: Any, v: Any) -> Any:
    """Of torch tensors; takes cuDNN's or FlashAttention's kernel as it sees fit."""
    import torch

    attend: Any = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_gradients(q: Any, k: Any, v: Any) -> Any:
    """Of the result as its own cotangent."""
    import torch

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sdpa(*inputs)
    return torch.autograd.grad(out, inputs, out.detach())
