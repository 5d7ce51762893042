"""The residual stream and the weights of attention over prompts, for probes: batched by length."""

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
from model.attention import WEIGHTS
from serving.memory import Model
from sharding import constrain

Array = jax.Array
Layers = tuple[int, ...]
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
    groups: dict[tuple[Layers, Layers, int, int], list[tuple[int, np.ndarray]]] = {}
    for place, request in enumerate(requests):
        if place not in known:
            tokens = tokenizer.encode_prompt(request.prompt)
            _check(place, request, len(tokens), max_length, model.config.num_layers)
            length = min(max(SMALLEST, 1 << (len(tokens) - 1).bit_length()), max_length)
            shape = (request.layers, request.attention, length, len(request.positions))
            groups.setdefault(shape, []).append((place, tokens))
    shards = 1 if model.runtime.layout is None else model.runtime.layout.size("batch")
    for (layers, attention, length, _), group in groups.items():
        rows = max(token_budget // length // shards, 1) * shards
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            names = (_names(layers), tuple(f"layers/{i}/{WEIGHTS}" for i in attention))
            values, weights = _run(model, names, length, rows, part, requests)
            yield [
                (place, HiddenStates(values[row], _cut(weights, row, len(tokens))))
                for row, (place, tokens) in enumerate(part)
            ]


def _names(layers: Layers) -> tuple[str, ...]:
    return tuple("embeddings" if layer == 0 else f"layers/{layer - 1}/hidden" for layer in layers)


def _cut(weights: np.ndarray | None, row: int, length: int) -> np.ndarray | None:
    """Those of a row, of its own tokens."""
    return None if weights is None else weights[row, ..., :length]


def _check(place: int, request: Hidden, length: int, max_length: int, num_layers: int) -> None:
    if not 0 < length <= max_length:
        raise RequestError(place, f"the prompt has {length} tokens; it may have 1 to {max_length}")
    wrong = next((layer for layer in request.layers if not 0 <= layer <= num_layers), None)
    if wrong is not None:
        raise RequestError(place, f"layer {wrong} is none of 0 (embedding) to {num_layers}")
    wrong = next((layer for layer in request.attention if not 0 <= layer < num_layers), None)
    if wrong is not None:
        raise RequestError(place, f"attention of layer {wrong}: layers are 0 to {num_layers - 1}")
    if not request.layers and not request.attention:
        raise RequestError(place, "asks for no layer")
    wrong = next((at for at in request.positions if not -length <= at < length), None)
    if wrong is not None:
        raise RequestError(place, f"position {wrong} is not in a prompt of {length} tokens")


def _run(
    model: Model,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    length: int,
    rows: int,
    part: Sequence[tuple[int, np.ndarray]],
    requests: Sequence[Hidden],
) -> tuple[np.ndarray, np.ndarray | None]:
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    places = np.zeros((rows, len(requests[part[0][0]].positions)), np.int32)
    for row, (place, ids) in enumerate(part):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        places[row] = [at % len(ids) for at in requests[place].positions]
    request = requests[part[0][0]]
    found = _taps(
        model.params,
        tokens,
        lengths,
        places,
        config=model.config,
        runtime=model.runtime,
        names=names,
        until=max(*request.layers, *(layer + 1 for layer in request.attention), 0),
    )
    values, weights = jax.device_get(found)
    if values is None:
        values = np.zeros((rows, places.shape[1], 0, model.config.d_model), np.float32)
    return values, weights


@functools.partial(jax.jit, static_argnames=("config", "runtime", "names", "until"))
def _taps(
    params: Mapping[str, Any],
    tokens: Array,
    lengths: Array,
    places: Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    until: int,
) -> tuple[Array | None, Array | None]:
    """`float32[rows, positions, layers, d_model]` and `float32[rows, positions, layers, heads,
    length]`; None for what is not asked for.
    """
    tokens = constrain(tokens, ("batch", "length"), runtime.layout)
    real = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    marked = real if padding_shows(config) else None
    options = {"segment_ids": marked, "taps": sum(names, ()), "until_layer": until}
    taps = hidden_states(params, tokens, config, runtime, **options)[1]["taps"]

    def stacked(kind: tuple[str, ...]) -> Array | None:
        if not kind:
            return None
        rows = jnp.arange(len(places))[:, None]
        return jnp.stack([taps[name][rows, places].astype(jnp.float32) for name in kind], axis=2)

    return stacked(names[0]), stacked(names[1])
