"""The attention mixer: multi-head and grouped-query, with optional QK-norm, window, soft cap, ALiBi
and cache.

Without a cache it rotates queries and keys itself; with one it hands them over un-rotated, with the
position encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import attention
from model import norms
from model.arrays import ArraySpec, hidden_kernel, output_std, vector
from model.remat import ATTENTION_OUTPUT
from sharding import constrain, context_attention, split_linear

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.context import Context

Array = jax.Array
WEIGHTS = "attention_weights"


def arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays of one attention layer."""
    d_model, head_dim, kv_heads = config.d_model, config.head_dim, config.kv_heads
    assert head_dim is not None
    assert kv_heads is not None
    widths = {
        "query": (config.num_heads * head_dim, "heads"),
        "key": (kv_heads * head_dim, "kv_heads"),
        "value": (kv_heads * head_dim, "kv_heads"),
    }
    specs = {}
    for name, (width, axis) in widths.items():
        specs[f"{name}/kernel"] = hidden_kernel(config, (d_model, width), ("d_model", axis))
        if config.qkv_bias:
            specs[f"{name}/bias"] = vector(width, axis)
    width = config.num_heads * head_dim
    specs["output/kernel"] = hidden_kernel(
        config, (width, d_model), ("heads", "d_model"), output_std(config)
    )
    if config.output_bias:
        specs["output/bias"] = vector(d_model, None)
    if config.qk_norm != "none":
        kind = norms.without_bias(config.norm)
        for name in ("query", "key"):
            width, axis = (head_dim, None) if config.qk_norm == "head" else widths[name]
            for path, spec in norms.arrays(kind, width, axis).items():
                specs[f"{name}_norm/{path}"] = spec
    return specs


def apply(
    params: Mapping[str, Any],
    x: Array,
    config: ModelConfig,
    context: Context,
    carry: dict[str, Any],
) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """`[batch, length, d_model] -> [batch, length, d_model]`; with `carry["cache"]`, appends to it
    and attends to it.
    """
    q, k, v = _project(params, x, config, context)
    out, carry = attend(q, k, v, config, context, carry)
    out = out.reshape(*x.shape[:2], -1)
    layout, key = context.runtime.layout, context.key("output")
    y = split_linear(params["output"], out, ("heads", "d_model"), layout, key)
    taps = {"query": q, "key": k, "value": v, "attention_heads": out}
    return y, carry, {"taps": taps | weights_tap(q, k, config, context, carry)}


def weights_tap(
    q: Array, k: Array, config: ModelConfig, context: Context, carry: Mapping[str, Any]
) -> dict[str, Array]:
    """The tap `attention_weights`, if it is asked for and there is no cache: `float32[batch,
    length, num_heads, length]`, what each query gives each key. It is attention to the identity, so
    it knows all that attention does.
    """
    if WEIGHTS not in context.taps or "cache" in carry:
        return {}
    batch, length, kv_heads, _ = k.shape
    one_hot = jnp.eye(length, dtype=jnp.float32)[None, :, None]
    identity = jnp.broadcast_to(one_hot, (batch, length, kv_heads, length))
    runtime = dataclasses.replace(context.runtime, attention="plain", layout=None)
    context = dataclasses.replace(context, runtime=runtime)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    return {WEIGHTS: _attend(q, k, identity, config, context)}


def attend(
    q: Array,
    k: Array,
    v: Array,
    config: ModelConfig,
    context: Context,
    carry: dict[str, Any],
) -> tuple[Array, dict[str, Any]]:
    """Attention of un-rotated heads, over the tokens at hand or, with `carry["cache"]`, over what
    it holds and them: `[batch, length, num_heads, head_dim]`, and the new carry.
    """
    if "cache" in carry:
        cache = carry["cache"].append(context.layer, k, v, context.meta, context.encoder)
        carry = {**carry, "cache": cache}
        out = cache.attend(
            context.layer,
            q,
            context.meta,
            context.encoder,
            scale=config.attention_scale,
            window=config.sliding_window,
            soft_cap=config.attention_soft_cap,
            implementation=context.runtime.attention,
            layout=context.runtime.layout,
        )
    else:
        out = _attend(q, k, v, config, context)
    return checkpoint_name(out, ATTENTION_OUTPUT), carry


def _project(
    params: Mapping[str, Any], x: Array, config: ModelConfig, context: Context
) -> tuple[Array, Array, Array]:
    """Un-rotated q `[batch, length, num_heads, head_dim]`, k and v `[batch, length, kv_heads,
    head_dim]`.
    """
    layout = context.runtime.layout
    projected = []
    for name, axis in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
        y = split_linear(params[name], x, ("d_model", axis), layout, context.key(name))
        if config.qk_norm != "none" and name != "value":
            y = _qk_norm(params[f"{name}_norm"], y, config)
        y = y.reshape(*x.shape[:2], -1, config.head_dim)
        projected.append(constrain(y, ("batch", "length", axis, None), layout))
    q, k, v = projected
    return q, k, v


def _qk_norm(params: Mapping[str, Array], y: Array, config: ModelConfig) -> Array:
    """Queries or keys `[batch, length, heads * head_dim]`, normed by head or in full."""
    kind = norms.without_bias(config.norm)
    if config.qk_norm == "full":
        return norms.normalise(kind, params, y, config.norm_eps)
    by_head = {"scale": params["scale"].reshape(-1, config.head_dim)}  # one row, or one a head
    heads = y.reshape(*y.shape[:2], -1, config.head_dim)
    return norms.normalise(kind, by_head, heads, config.norm_eps).reshape(y.shape)


def _attend(q: Array, k: Array, v: Array, config: ModelConfig, context: Context) -> Array:
    """Causal self-attention over the tokens at hand: `[batch, length, num_heads, head_dim]`."""
    positions, segment_ids = context.positions, context.segment_ids
    encoder, layout = context.encoder, context.runtime.layout
    attend = attention
    if layout is not None:
        attend = functools.partial(context_attention, attention, layout=layout)
    return attend(
        encoder.rotate(q, positions),
        encoder.rotate(k, positions),
        v,
        query_positions=positions,
        key_positions=positions,
        query_segment_ids=segment_ids,
        key_segment_ids=segment_ids,
        window=config.sliding_window,
        soft_cap=config.attention_soft_cap,
        alibi_slopes=encoder.slopes(),
        scale=config.attention_scale,
        implementation=context.runtime.attention,
    )
