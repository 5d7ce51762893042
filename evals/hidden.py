"""The residual stream over prompts, for probes: batched by length, as scores are."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.tokenizers import Tokenizer
from evals.scoring import padding_shows
from evals.task import Hidden, HiddenStates, RequestError, Response
from model import ModelConfig, Runtime, hidden_states
from serving.memory import Model
from sharding import constrain

Array = jax.Array
SMALLEST = 64


def hidden_of(
    model: Model,
    tokenizer: Tokenizer,
    requests: Sequence[Hidden],
    known: Collection[int],
    max_length: int,
    token_budget: int,
) -> Iterator[list[tuple[int, Response]]]:
    """`HiddenStates` with the places of their requests, a batch at a time."""
    groups: dict[tuple[tuple[int, ...], int, int], list[tuple[int, np.ndarray]]] = {}
    for place, request in enumerate(requests):
        if place not in known:
            tokens = tokenizer.encode_prompt(request.prompt)
            _check(place, request, len(tokens), max_length, model.config.num_layers)
            length = min(max(SMALLEST, 1 << (len(tokens) - 1).bit_length()), max_length)
            shape = (request.layers, length, len(request.positions))
            groups.setdefault(shape, []).append((place, tokens))
    shards = 1 if model.runtime.layout is None else model.runtime.layout.size("batch")
    for (layers, length, _), group in groups.items():
        rows = max(token_budget // length // shards, 1) * shards
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            values = _run(model, layers, length, rows, part, requests)
            yield [(place, HiddenStates(values[row])) for row, (place, _) in enumerate(part)]


def _check(place: int, request: Hidden, length: int, max_length: int, num_layers: int) -> None:
    if not 0 < length <= max_length:
        raise RequestError(place, f"the prompt has {length} tokens; it may have 1 to {max_length}")
    wrong = next((layer for layer in request.layers if not 0 <= layer <= num_layers), None)
    if wrong is not None:
        raise RequestError(place, f"layer {wrong} is none of 0 (embedding) to {num_layers}")
    wrong = next((at for at in request.positions if not -length <= at < length), None)
    if wrong is not None:
        raise RequestError(place, f"position {wrong} is not in a prompt of {length} tokens")


def _run(
    model: Model,
    layers: tuple[int, ...],
    length: int,
    rows: int,
    part: Sequence[tuple[int, np.ndarray]],
    requests: Sequence[Hidden],
) -> np.ndarray:
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    places = np.zeros((rows, len(requests[part[0][0]].positions)), np.int32)
    for row, (place, ids) in enumerate(part):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        places[row] = [at % len(ids) for at in requests[place].positions]
    names = tuple("embeddings" if layer == 0 else f"layers/{layer - 1}/hidden" for layer in layers)
    found = _taps(
        model.params,
        tokens,
        lengths,
        places,
        config=model.config,
        runtime=model.runtime,
        names=names,
        until=max(layers, default=0),
    )
    return np.asarray(jax.device_get(found))


@functools.partial(jax.jit, static_argnames=("config", "runtime", "names", "until"))
def _taps(
    params: Mapping[str, Any],
    tokens: Array,
    lengths: Array,
    places: Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    names: tuple[str, ...],
    until: int,
) -> Array:
    """`float32[rows, positions, layers, d_model]`."""
    tokens = constrain(tokens, ("batch", "length"), runtime.layout)
    real = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    marked = real if padding_shows(config) else None
    options = {"segment_ids": marked, "taps": names, "until_layer": until}
    taps = hidden_states(params, tokens, config, runtime, **options)[1]["taps"]
    stacked = jnp.stack([taps[name] for name in names], axis=2).astype(jnp.float32)
    return jnp.take_along_axis(stacked, places[:, :, None, None], axis=1)
