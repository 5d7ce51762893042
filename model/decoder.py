"""The decoder: embedding, segments of layers, final norm, head.

Each segment of equal layers is one loop, so unequal layers compile as many bodies as there are
kinds in a row. The loop can stop early (`until_layer`), returns intermediates by name (`taps`), and
carries the cache, so that no second cache is ever allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model import norms
from model.block import block, dropout
from model.caches.paged import PagedCache
from model.caches.protocol import DecoderCache
from model.config import ModelConfig, Segment
from model.context import Context
from model.head import logits
from model.moe.stack import put_back, set_apart
from model.positions import PositionEncoder
from model.remat import remat
from model.runtime import DEFAULT_RUNTIME, Runtime
from model.segments import segments_of
from sharding import check_heads, constrain, gather_rows
from weights import embed, linear, nearest

Array = jax.Array
Params = Mapping[str, Any]
EMBEDDING_KEY = 1 << 20
"""Folded into the dropout key for the embedding; layers fold in their own number, which is
smaller.
"""


def forward(
    params: Params,
    tokens: Array | None,
    config: ModelConfig,
    runtime: Runtime = DEFAULT_RUNTIME,
    **options: Any,
) -> tuple[Array, dict[str, Any]]:
    """Logits `float32[batch, length, vocab]` and aux; all options are those of `hidden_states`.

    With `until_layer` the final norm and the head read the residual stream after that many layers.
    """
    hidden, aux = hidden_states(params, tokens, config, runtime, **options)
    return logits(params, hidden, config, runtime), aux


def hidden_states(
    params: Params,
    tokens: Array | None,
    config: ModelConfig,
    runtime: Runtime = DEFAULT_RUNTIME,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    cache: DecoderCache | PagedCache | None = None,
    until_layer: int | None = None,
    taps: Sequence[str] = (),
    rng: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """What the head multiplies: the residual stream after the layers and the final norm.

    Args:
        params: the tree that `model.init` makes; kernels may be any weight format.
        tokens: `int32[batch, length]`, or None with `inputs_embeds`.
        config: what the model is.
        runtime: how it runs.
        positions: `int32[batch, length]` within each document; None counts in each document, or
            from what the cache holds.
        segment_ids: `int32[batch, length]`; documents see only themselves, 0 is padding, on either
            side. None: one document a row.
        inputs_embeds: `[batch, length, d_model]` in place of embedded (and projected) tokens.
        cache: earlier keys and values; the new cache comes back as `aux["cache"]`. Tokens stand
            after what it holds; each row is one document, and segment id 0 is padding. A paged one
            takes a token a row, `[tokens, 1]`, of the sequences in its plan.
        until_layer: run only layers `0..until_layer-1`.
        taps: names of intermediates: "embeddings", "layers/3/hidden", "layers/3/query", …
        rng: key for dropout; None turns dropout off.

    Returns:
        `[batch, length, d_model]` in the compute dtype, and aux: what layers report, stacked
        `[layers, …]`, with `aux["taps"]` `{name: array}` and `aux["cache"]` if asked for.
    """
    stop = _check_until(until_layer, config)
    wanted = _group_taps(taps, stop)
    x = token_inputs(params, tokens, inputs_embeds, config, runtime)
    check_length(x.shape[1], config)
    meta = None if cache is None else _step(cache, x.shape, positions, segment_ids)
    positions = positions_of(x.shape, positions, segment_ids, meta)
    longest = longest_of(positions, segment_ids) if cache is None else cache.planned_length
    x = embedded(params, x, positions, config, runtime, rng)
    taken = {"embeddings": x} if "embeddings" in wanted else {}
    once = cache is not None and _one_device(runtime)
    reports, caches, encoders = [], {}, {}
    for segment in _until(params, config, stop):
        carry = {} if cache is None else {"cache": cache.segments[segment.name]}
        if segment.layer not in encoders:
            encoder = PositionEncoder(segment.layer, longest)
            encoders[segment.layer] = encoder.prepared(positions, once=once)
        encoder = encoders[segment.layer]
        context = segment_context(segment, positions, segment_ids, encoder, runtime, rng, meta)
        x, carry, aux = _run(params, x, segment, stop, context, carry, wanted)
        taken.update(aux.pop("taps", {}))
        reports.append(aux)
        if cache is not None:
            caches[segment.name] = carry["cache"]
    x = final_normed(params, x, config)
    merged = _concatenate(reports)
    if taps:
        merged["taps"] = taken
    if cache is not None and meta is not None:
        merged["cache"] = cache.advance(caches, meta)
    return x, merged


def token_inputs(
    params: Params,
    tokens: Array | None,
    inputs_embeds: Array | None,
    config: ModelConfig,
    runtime: Runtime,
) -> Array:
    """Token embeddings `[batch, length, d_model]` in the compute dtype, or the ones given."""
    if tokens is not None and inputs_embeds is None:
        x = _rows(params["embed"], tokens, runtime)
        x = x if config.d_embed is None else linear(params["embed_projection"], x)
    elif inputs_embeds is not None and tokens is None:
        x = inputs_embeds.astype(runtime.compute_dtype)
    else:
        raise ValueError("forward takes tokens or inputs_embeds, exactly one of them")
    if x.ndim != 3 or x.shape[-1] != config.d_model:
        raise ValueError(
            f"embeddings have shape {x.shape}; expected [batch, length, {config.d_model}] "
            "(tokens are int32[batch, length])"
        )
    return x


def _rows(params: Params, ids: Array, runtime: Runtime, axis: str = "vocab") -> Array:
    """Rows of an embedding in the compute dtype, looked up where that part of the table lies."""
    table = gather_rows(params["table"], runtime.layout, axis)
    return embed({"table": table}, ids, runtime.compute_dtype)


def embedded(
    params: Params,
    x: Array,
    positions: Array,
    config: ModelConfig,
    runtime: Runtime,
    rng: Array | None,
) -> Array:
    """Scale, learned positions, norm and dropout of the embeddings."""
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.positions == "learned":
        ids = positions + config.position_offset
        rows = _rows(params["positions"], ids, runtime, "positions")
        x = x + rows * jnp.asarray(config.position_scale, x.dtype)
    if config.embed_norm:
        x = norms.normalise(config.norm, params.get("embed_norm", {}), x, config.norm_eps)
    if rng is not None:
        x = dropout(x, config.dropout, jax.random.fold_in(rng, EMBEDDING_KEY))
    return constrain(x, ("batch", "length", "hidden"), runtime.layout)


def final_normed(params: Params, x: Array, config: ModelConfig) -> Array:
    """The final norm of the residual stream, if the config has one."""
    if not config.final_norm:
        return x
    eps = config.norm_eps if config.final_norm_eps is None else config.final_norm_eps
    return norms.normalise(config.norm, params.get("final_norm", {}), x, eps)


def segment_context(
    segment: Segment,
    positions: Array,
    segment_ids: Array | None,
    encoder: PositionEncoder,
    runtime: Runtime,
    rng: Array | None,
    meta: Any,
) -> Context:
    """What the blocks of one segment know; the layout of their heads is settled once."""
    layer = segment.layer
    if runtime.layout is not None:
        layout = check_heads(runtime.layout, layer.num_heads, layer.kv_heads or layer.num_heads)
        runtime = dataclasses.replace(runtime, layout=layout)
    return Context(positions, segment_ids, encoder, runtime, rng=rng, meta=meta)


def _run(
    params: Params,
    x: Array,
    segment: Segment,
    stop: int,
    context: Context,
    carry: dict[str, Any],
    wanted: dict[str, list[int]],
) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """The layers of one segment below `stop`, as one loop; aux is stacked over them, taps are
    picked out by layer.
    """
    stack = params["layers"][segment.name]
    count = min(segment.stop, stop) - segment.start
    if count < len(segment):
        stack = jax.tree.map(lambda leaf: leaf[:count], stack)
    here = range(segment.start, segment.start + count)
    sites = frozenset(site for site, layers in wanted.items() if any(n in here for n in layers))
    apart = "cache" in carry and _one_device(context.runtime)
    stack, experts = set_apart(stack) if apart else (stack, {})

    def body(state: tuple[Array, Any], inputs: tuple[Any, Array]) -> tuple[Any, Any]:
        (hidden, carried), (layer_params, index) = state, inputs
        rng = context.rng
        if rng is not None:
            rng = jax.random.fold_in(rng, segment.start + index)
        here = dataclasses.replace(context, layer=index, rng=rng, taps=sites)
        layer_params = put_back(layer_params, experts, index)
        hidden, carried, aux = block(layer_params, hidden, segment.layer, here, carried)
        return (hidden, carried), aux

    unroll = context.runtime.scan_unroll or count
    body = remat(body, context.runtime.remat, in_loop=unroll < count)
    (x, carry), aux = jax.lax.scan(body, (x, carry), (stack, jnp.arange(count)), unroll=unroll)
    stacked = aux.pop("taps", {})
    aux["taps"] = {
        f"layers/{layer}/{site}": stacked[site][layer - segment.start]
        for site in sites
        for layer in wanted[site]
        if layer in here
    }
    return x, carry, aux


def _one_device(runtime: Runtime) -> bool:
    return runtime.layout is None or runtime.layout.mesh.size == 1


def _until(params: Params, config: ModelConfig, stop: int) -> list[Segment]:
    """The segments with layers below `stop`; params may leave out layers that none is run of."""
    segments = segments_of(params, config) if stop else ()
    return [segment for segment in segments if segment.start < stop]


def _concatenate(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What layers report, by name, concatenated over the segments that report it: `[layers, …]`.

    Vectors of different lengths (loads of layers with fewer experts) are filled up with zeros.
    """
    names = sorted({name for report in reports for name in report})
    merged = {}
    for name in names:
        parts = [report[name] for report in reports if name in report]
        longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        merged[name] = jnp.concatenate([_filled(part, longest) for part in parts])
    return merged


def _filled(x: Array, sizes: Sequence[int]) -> Array:
    """`[layers, …]` with zeros behind, up to these sizes of the other axes."""
    return jnp.pad(x, [(0, 0), *((0, n - m) for n, m in zip(sizes, x.shape[1:], strict=True))])


def _step(
    cache: DecoderCache | PagedCache,
    shape: tuple[int, ...],
    positions: Array | None,
    segment_ids: Array | None,
) -> Any:
    """The cache's account of where new tokens stand, since it counts positions itself."""
    if positions is not None:
        raise ValueError("with a cache, positions follow from what it holds: leave positions=None")
    return cache.step(shape, segment_ids)


def positions_of(
    shape: tuple[int, ...],
    positions: Array | None,
    segment_ids: Array | None,
    meta: Any,
) -> Array:
    """`int32[batch, length]`: after what a cache holds, or as given, or counted in each
    document.
    """
    if meta is not None:
        return meta.positions
    if positions is not None:
        return positions
    places = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape[:2])
    if segment_ids is None:
        return places
    begins = segment_ids != jnp.roll(segment_ids, 1, axis=1)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def longest_of(positions: Array, segment_ids: Array | None) -> Array:
    """`int32[]`, the length of the longest document at hand, padding left out."""
    real = positions if segment_ids is None else jnp.where(segment_ids > 0, positions, 0)
    return jnp.max(real) + 1


def _check_until(until_layer: int | None, config: ModelConfig) -> int:
    if until_layer is None:
        return config.num_layers
    if not 0 <= until_layer <= config.num_layers:
        raise ValueError(f"until_layer is {until_layer}; the model has {config.num_layers} layers")
    return until_layer


def check_length(length: int, config: ModelConfig) -> None:
    """Raise `ValueError` if a sequence is longer than the learned positions."""
    if config.positions == "learned" and length > config.max_length:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the {config.max_length} learned "
            "positions (model.max_length); shorten it or grow the position table"
        )


def _group_taps(taps: Iterable[str], stop: int) -> dict[str, list[int]]:
    """`{site: [layers]}` of tap names; the embeddings are a site of their own."""
    wanted: dict[str, list[int]] = {}
    for name in taps:
        head, _, rest = name.partition("/")
        layer, _, site = rest.partition("/")
        if name == "embeddings":
            wanted[name] = []
        elif head != "layers" or not layer.isdigit() or not site:
            near = nearest(name, ("embeddings", "layers/0/hidden", "layers/0/attention_output"))
            raise ValueError(
                f"tap {name!r} is neither 'embeddings' nor 'layers/N/NAME'; like: {near}"
            )
        elif int(layer) >= stop:
            raise ValueError(f"tap {name!r}: only layers 0..{stop - 1} are run")
        else:
            wanted.setdefault(site, []).append(int(layer))
    return wanted
