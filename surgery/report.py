"""Perplexity of a model on held-out windows, streamed through it layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import ModelConfig, Runtime
from model.segments import segments_of
from surgery import blocks
from surgery.source import Source
from surgery.work import Work
from weights import bits_per_weight, flatten

Array = jax.Array


def window_losses(
    source: Source,
    tokens: np.ndarray,
    *,
    runtime: Runtime | None = None,
    work: Work | None = None,
) -> np.ndarray:
    """Mean loss of each window, `float64[windows]` in nats a token, over its `length - 1`
    predictions.

    Each layer is read once and held alone; the hidden states lie in `work`.
    """
    config, runtime = source.config, runtime or Runtime()
    work = work or Work(config)
    outer = jax.tree.map(jnp.asarray, blocks.without_layers(source.outer()))
    shape = (*tokens.shape, config.d_model)

    def hidden(layer: int) -> np.ndarray:
        return work.hidden("evaluation", layer, shape, jnp.dtype(runtime.compute_dtype))

    for row, window in enumerate(tokens):
        hidden(0)[row] = blocks.embed(outer, window[None], config, runtime)[0]
    for layer in range(config.num_layers):
        params = jax.tree.map(jnp.asarray, source.layer(layer))
        before, after = hidden(layer), hidden(layer + 1)
        for row in range(len(tokens)):
            after[row] = blocks.block(params, before[row : row + 1], config.layer(layer), runtime)[
                0
            ]
    last = hidden(config.num_layers)
    return np.asarray(
        [
            _loss(outer, last[row : row + 1], window[None], config, runtime)
            for row, window in enumerate(tokens)
        ],
        np.float64,
    )


def perplexity(
    source: Source, tokens: np.ndarray, *, runtime: Runtime | None = None, work: Work | None = None
) -> float:
    """`exp` of the mean of the windows' mean losses, as published tables have it."""
    return float(np.exp(window_losses(source, tokens, runtime=runtime, work=work).mean()))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the report's rows, weighted by the number of weights of each matrix."""
    weights = np.asarray([np.prod(row["shape"]) for row in rows], np.float64)
    found = {}
    for name in ("bits", "nominal_bits", "weight_error", "proxy_loss", "seconds"):
        if all(name in row for row in rows):
            values = np.asarray([np.mean(row[name]) for row in rows])
            total = values.sum() if name == "seconds" else np.average(values, weights=weights)
            found[name] = float(total)
    return found


def with_stored_bits(
    rows: Iterable[Mapping[str, Any]], params: Mapping[str, Any], config: ModelConfig
) -> list[dict[str, Any]]:
    """The report's rows with the bits of what is stored at last, where lists of the layers of a
    stack are all as long as the longest.
    """
    bits = {
        (layer, path): bits_per_weight(weight)
        for segment in segments_of(params, config)
        for path, weight in flatten(params["layers"][segment.name]).items()
        for layer in range(segment.start, segment.stop)
    }
    return [{**row, "bits": bits[row["layer"], row["path"]]} for row in rows]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _loss(
    outer: blocks.Params, hidden: Array, tokens: Array, config: ModelConfig, runtime: Runtime
) -> Array:
    logits = blocks.head(outer, hidden, config, runtime)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
