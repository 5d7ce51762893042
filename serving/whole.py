"""What is computed over a whole text at once, beside the steps of generation: the log-probabilities
of its tokens, and its vector.

Texts are padded to a power of two, so that few programs are compiled; the head runs on a block of
rows at a time, so logits of a whole text are never there together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from model import ModelConfig, Runtime, hidden_states, logits
from serving.device import logprob_of
from serving.memory import Model
from serving.outputs import TokenLogprob
from serving.sampling import Sampled, with_logprobs
from weights import low_rank_bank

Array = jax.Array
SMALLEST, ROWS = 16, 256
Pooling = Literal["last", "mean"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def score(
    model: Model, tokens: Sequence[int], *, count: int, longest: int, adapter: int = 0
) -> list[TokenLogprob]:
    """Log-probability of each token but the first, given those before it, with the `count`
    likeliest ones in its place.

    longest: most tokens of a text; widths end there. adapter: its number, 0 for none.
    """
    options = {"config": model.config, "runtime": model.runtime, "count": count}
    inputs = _padded(tokens, longest), np.int32(adapter)
    found = jax.device_get(_score(model.params, *inputs, **options))
    return [logprob_of(found, row) for row in range(len(tokens) - 1)]


def embed(
    model: Model,
    texts: Sequence[Sequence[int]],
    *,
    pooling: Pooling,
    longest: int,
    adapter: int = 0,
) -> np.ndarray:
    """`float32[texts, d_model]`, of length 1 each: the last token's hidden state after the final
    norm, or the mean of all tokens'.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
    options = {"config": model.config, "runtime": model.runtime, "pooling": pooling}
    vectors = [
        _embed(
            model.params, _padded(text, longest), np.int32(len(text)), np.int32(adapter), **options
        )
        for text in texts
    ]
    return np.stack([np.asarray(vector) for vector in vectors])


@functools.partial(jax.jit, static_argnames=("config", "runtime", "count"))
def _score(
    params: Mapping[str, Any],
    tokens: Array,
    adapter: Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    count: int,
) -> Sampled:
    """Each place's next token, as if it had been sampled there."""
    params = low_rank_bank.choose(params, adapter[None, None])
    hidden, _ = hidden_states(params, tokens, config, runtime)
    following = jnp.roll(tokens[0], -1)
    size = ROWS if len(following) % ROWS == 0 else len(following)
    blocks = hidden[0].reshape(-1, size, hidden.shape[2]), following.reshape(-1, size)

    def one(block: tuple[Array, Array]) -> Sampled:
        rows, targets = block
        scores = logits(params, rows[None], config, runtime)[0]
        return with_logprobs(targets, scores, count)

    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(one, blocks))


@functools.partial(jax.jit, static_argnames=("config", "runtime", "pooling"))
def _embed(
    params: Mapping[str, Any],
    tokens: Array,
    length: Array,
    adapter: Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    pooling: Pooling,
) -> Array:
    params = low_rank_bank.choose(params, adapter[None, None])
    hidden = hidden_states(params, tokens, config, runtime)[0][0].astype(jnp.float32)
    if pooling == "last":
        vector = hidden[length - 1]
    else:
        mine = jnp.arange(len(hidden)) < length
        vector = jnp.where(mine[:, None], hidden, 0.0).sum(0) / length
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)


def _padded(text: Sequence[int], longest: int) -> np.ndarray:
    width = min(max(SMALLEST, 1 << (len(text) - 1).bit_length()), longest)
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(text)] = text
    return padded
