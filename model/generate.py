"""Generation: a prefill of right-padded prompts, then one compiled loop, a token for each row a
turn.

Rows never touch one another: each has its own positions, key and end, so its tokens are those that
it would get alone (but for rotary scalings that go by the length of the longest row).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.caches import DecoderCache, init_cache
from model.config import ModelConfig
from model.decoder import hidden_states
from model.head import logits
from model.layers_apart import can_be_apart, layers_apart
from model.runtime import DEFAULT_RUNTIME, Runtime
from model.sampling import GREEDY, Sampling, sample
from model.segments import segments_of

Array = jax.Array
SMALLEST_WIDTH = 16
"""Prompts are padded to a power of two from here on, so that few widths are ever compiled."""
SMALLEST_ROOM = 16
"""So is the room for new tokens."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generation:
    """What was generated.

    tokens: int32[batch, max_new_tokens]; after a row's end, the pad token.
    lengths: int32[batch], new tokens of each row, a stop token included.
    """

    tokens: Array
    lengths: Array

    def lists(self) -> list[list[int]]:
        """Each row's new tokens as a list of ints, a stop token included."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def generate(
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]] | Array | np.ndarray,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    rng: Array | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
    pad_token: int = 0,
) -> Generation:
    """Continue each prompt.

    Args:
        params: the model's params.
        prompts: token ids, one row a prompt; rows may differ in length, none may be empty.
        config: what the model is.
        max_new_tokens: most tokens to add to a row.
        sampling: how a token is drawn; the default is greedy.
        stop_tokens: ids that end a row.
        rng: key, needed unless greedy; row i draws from `fold_in(rng, i)`.
        runtime: how the model runs.
        pad_token: what stands after a row's end.

    Raises `ValueError` for an empty prompt, an id outside the vocabulary, a missing key, or more
    tokens than the model has learned positions for.
    """
    rows = [np.asarray(row, np.int32).reshape(-1) for row in prompts]
    _check(rows, config, max_new_tokens, sampling, rng)
    longest = max(len(row) for row in rows)
    chunk, width = _prefill_shape(longest, config)
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    if runtime.layout is None and can_be_apart(params):
        params = layers_apart(params)
    room = max(SMALLEST_ROOM, 1 << (max_new_tokens - 1).bit_length())
    made = _generate(
        params,
        padded,
        np.asarray([len(row) for row in rows], np.int32),
        np.int32(max_new_tokens),
        jax.random.key(0) if rng is None else rng,
        config=config,
        room=room,
        sampling=sampling,
        stop_tokens=tuple(stop_tokens),
        runtime=runtime,
        pad_token=pad_token,
        chunk=chunk,
    )
    if room == max_new_tokens:
        return made
    # Cut on the host: on a device each length would be compiled.
    return dataclasses.replace(
        made, tokens=jnp.asarray(np.asarray(made.tokens)[:, :max_new_tokens])
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "config",
        "room",
        "sampling",
        "stop_tokens",
        "runtime",
        "pad_token",
        "chunk",
    ),
)
def _generate(
    params: Mapping[str, Any],
    prompts: Array,
    lengths: Array,
    max_new_tokens: Array,
    rng: Array,
    *,
    config: ModelConfig,
    room: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    runtime: Runtime,
    pad_token: int,
    chunk: int,
) -> Generation:
    batch, width = prompts.shape
    # Written-out layers would copy each layer's weights out of its stack for every token.
    runtime = dataclasses.replace(runtime, scan_unroll=1)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(batch))
    cache = init_cache(
        config,
        batch,
        width + room,
        planned_length=jnp.max(lengths) + max_new_tokens,
        chunk=chunk,
        dtype=runtime.compute_dtype,
        layout=runtime.layout,
        segments=segments_of(params, config),
    )

    def draw(hidden: Array, step: Array | int) -> Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(row_keys)
        return sample(logits(params, hidden, config, runtime)[:, 0], keys, sampling)

    def unfinished(state: tuple[Any, ...]) -> Array:
        step, _, _, _, _, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def turn(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, cache, token, tokens, counts, done = state
        alive = (~done)[:, None].astype(jnp.int32)
        hidden, aux = hidden_states(
            params, token[:, None], config, runtime, cache=cache, segment_ids=alive
        )
        token = jnp.where(done, pad_token, draw(hidden, step))
        tokens = tokens.at[:, step].set(token)
        return step + 1, aux["cache"], token, tokens, counts + ~done, done | _ends(token)

    def _ends(token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))

    cache, hidden = _prefill(params, prompts, lengths, cache, config, runtime, chunk)
    first = draw(hidden, 0)
    tokens = jnp.full((batch, room), pad_token, jnp.int32).at[:, 0].set(first)
    counts = jnp.ones(batch, jnp.int32)
    state = (jnp.asarray(1), cache, first, tokens, counts, _ends(first))
    _, _, _, tokens, counts, _ = jax.lax.while_loop(unfinished, turn, state)
    return Generation(tokens, counts)


def _prefill(
    params: Mapping[str, Any],
    prompts: Array,
    lengths: Array,
    cache: DecoderCache,
    config: ModelConfig,
    runtime: Runtime,
    chunk: int,
) -> tuple[DecoderCache, Array]:
    """Fill the cache with `[batch, width]` prompts, a chunk at a time; also each row's last hidden
    state.

    Returns the cache and `[batch, 1, d_model]`.
    """
    batch, width = prompts.shape
    pieces = jnp.moveaxis(prompts.reshape(batch, width // chunk, chunk), 1, 0)

    def fill(state: tuple[DecoderCache, Array], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        (cache, last), (piece, start) = state, inputs
        valid = (start + jnp.arange(chunk) < lengths[:, None]).astype(jnp.int32)
        hidden, aux = hidden_states(params, piece, config, runtime, cache=cache, segment_ids=valid)
        index = lengths - 1 - start
        here = jnp.take_along_axis(hidden, jnp.clip(index, 0, chunk - 1)[:, None, None], axis=1)
        ends = ((index >= 0) & (index < chunk))[:, None, None]
        return (aux["cache"], jnp.where(ends, here, last)), None

    last = jnp.zeros((batch, 1, config.d_model), runtime.compute_dtype)
    starts = jnp.arange(width // chunk) * chunk
    (cache, last), _ = jax.lax.scan(fill, (cache, last), (pieces, starts))
    return cache, last


def _prefill_shape(longest: int, config: ModelConfig) -> tuple[int, int]:
    """Tokens in a prefill step, and the padded width of the prompts, a multiple of it.

    Where the model has sliding windows shorter than the prompt, a step is the longest window, so
    that rolling caches stay under twice their windows.
    """
    width = max(SMALLEST_WIDTH, 1 << (longest - 1).bit_length())
    if config.positions == "learned":
        width = min(width, config.max_length)
    windows = [segment.layer.sliding_window or width for segment in config.segments]
    chunk = max((window for window in windows if window < width), default=width)
    return chunk, -(-width // chunk) * chunk


def _check(
    rows: list[np.ndarray], config: ModelConfig, new: int, sampling: Sampling, rng: Array | None
) -> None:
    if not rows or new < 1:
        raise ValueError(f"nothing to generate: {len(rows)} prompts, max_new_tokens {new}")
    for index, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"prompt {index} is empty; give it at least one token")
        if row.min() < 0 or row.max() >= config.vocab_size:
            raise ValueError(
                f"prompt {index} holds token {row.min() if row.min() < 0 else row.max()}; "
                f"the vocabulary is 0..{config.vocab_size - 1}"
            )
    if sampling.temperature > 0.0 and rng is None:
        raise ValueError("sampling with temperature > 0 needs a key: rng=jax.random.key(seed)")
    longest = max(len(row) for row in rows)
    if config.positions == "learned" and longest + new > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones are more than the "
            f"{config.max_length} learned positions (model.max_length); shorten either"
        )
