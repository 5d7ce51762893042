"""Sampling on the device: the next token of each row by its own settings, in the order of vLLM's
sampler.

On float32 logits: raw log-probabilities; allowed ids and the grammar's mask; banned words; no end
before `min_tokens`; `logit_bias`; penalties; the most likely token for greedy rows; temperature;
min-p, top-k, then top-p of what is left; and Gumbel noise of a key that depends on seed, choice and
position only. So a row's token never depends on the rows around it.

Thresholds are found bit by bit rather than by sorting: the same sets, at a fixed number of passes
over the logits. What no row asks for is skipped as the program runs, so settings compile nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from model.sampling import most_likely
from serving.sampling_settings import ANY, Settings

Array = jax.Array
NOTHING = -1
"""Stands for a token that no id may be."""


@dataclass(frozen=True)
class Variant:
    """What a sampler is compiled for.

    draws: some row may have a temperature above 0.
    logprobs: how many likeliest tokens come back with log-probabilities; None returns none at all.
    processed: log-probabilities of what was drawn from, rather than of the model.
    reads: also those of prompts, where a sequence asks for it.
    vocab_size: ids from here on are padding of the table and never drawn; None has no padding.
    """

    draws: bool = True
    logprobs: int | None = None
    processed: bool = False
    reads: bool = False
    vocab_size: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What is known of the rows beside their logits.

    settings: of each row.
    positions: int32[rows], of the token to come in its sequence.
    recent: int32[rows, words - 1], the tokens generated last, oldest first; -1 before the first.
    seen: int32[slots, vocab], twice how often a token was generated, and 1 more if in the prompt.
    slots: int32[rows], row of `seen`.
    """

    settings: Settings
    positions: Array
    recent: Array
    seen: Array
    slots: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """What was drawn; all but `tokens` is None without log-probabilities.

    tokens: int32[rows]; `NOTHING` where every id is forbidden.
    logprobs: float32[rows], log-probability of each token.
    ranks: int32[rows], 1 for the likeliest.
    top_tokens, top_logprobs: int32 and float32[rows, n], the likeliest in falling order.
    read: what the step tells of prompts, if it was compiled for that.
    """

    tokens: Array
    logprobs: Array | None = None
    ranks: Array | None = None
    top_tokens: Array | None = None
    top_logprobs: Array | None = None
    read: Read | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Read:
    """What a step tells of prompts.

    following: the token after each token of the step, as if it had been sampled.
    sums, lasts: float32[sequences, d_model], of the hidden states of each sequence's tokens in the
        step their sum, and the last one.
    """

    following: Sampled
    sums: Array
    lasts: Array


def sample(logits: Array, rows: Rows, variant: Variant, grammar: Array | None = None) -> Sampled:
    """One token for each row of logits `[rows, vocab]`.

    grammar: `uint32[rows, ceil(vocab / 32)]`, bit i of word w allows id `32 w + i`; None allows
    all. Log-probabilities are zeros if no row's settings ask for them.
    """
    raw = z = drawable(logits, variant)
    if grammar is not None:
        z = jnp.where(_bits(grammar, z.shape[1]), z, -jnp.inf)
    z = jax.lax.cond(jnp.any(rows.settings.adjusts), adjust, lambda z, _: z, z, rows)
    tokens = most_likely(z)
    forbidden = jnp.take_along_axis(z, tokens[:, None], axis=1)[:, 0] == -jnp.inf
    if variant.draws:
        hot = jnp.any(rows.settings.temperature > 0.0)
        tokens, z = jax.lax.cond(hot, _draw, lambda z, tokens, _: (tokens, z), z, tokens, rows)
    tokens = jnp.where(forbidden, NOTHING, tokens)
    if variant.logprobs is None:
        return Sampled(tokens)
    scored = z if variant.processed else raw
    return _if_asked(tokens, scored, variant.logprobs, jnp.any(rows.settings.logprobs))


def drawable(logits: Array, variant: Variant) -> Array:
    """Logits `[rows, vocab]` in float32, without padding of the table."""
    z = logits.astype(jnp.float32)
    if variant.vocab_size is None or variant.vocab_size >= z.shape[1]:
        return z
    return jnp.where(jnp.arange(z.shape[1]) < variant.vocab_size, z, -jnp.inf)


def with_logprobs(tokens: Array, z: Array, count: int) -> Sampled:
    """The tokens `[rows]` with their log-probabilities under logits `[rows, vocab]`, and the
    `count` likeliest ones'.
    """
    logprobs = jax.nn.log_softmax(z, axis=1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)
    ranks = 1 + jnp.sum(logprobs > chosen, axis=1, dtype=jnp.int32)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(count, z.shape[1]))
    return Sampled(tokens, chosen[:, 0], ranks, top_tokens, top_logprobs)


def _if_asked(tokens: Array, z: Array, count: int, asked: Array) -> Sampled:
    def scores() -> Sampled:
        return with_logprobs(tokens, z, count)

    def zeros() -> Sampled:
        shapes = jax.eval_shape(scores)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return dataclasses.replace(jax.lax.cond(asked, scores, zeros), tokens=tokens)


def adjust(z: Array, rows: Rows) -> Array:
    """Logits `[rows, vocab]` without forbidden ids, with biases and penalties."""
    settings, vocab = rows.settings, z.shape[1]
    row = jnp.arange(len(z))[:, None]
    z = jnp.where(_bits(settings.allowed, vocab), z, -jnp.inf)
    *start, last = jnp.moveaxis(settings.words, 2, 0)
    spelt = last >= 0
    for place, token in enumerate(start):
        spelt &= (token == ANY) | (token == rows.recent[:, place, None])
    early = rows.positions - settings.prompt_lengths < settings.min_tokens
    forbidden = [jnp.where(spelt, last, vocab)]
    forbidden += [jnp.where(early[:, None] & (settings.ends >= 0), settings.ends, vocab)]
    for ids in forbidden:
        z = z.at[row, ids].set(-jnp.inf, mode="drop")
    biased = jnp.where(settings.bias_ids >= 0, settings.bias_ids, vocab)
    z = z.at[row, biased].add(settings.bias_values, mode="drop")
    return penalise(z, rows.seen[rows.slots], settings)


def penalise(z: Array, seen: Array, settings: Settings) -> Array:
    """Repetition, frequency, then presence penalties; the prompt counts for repetition only."""
    generated = (seen >> 1).astype(jnp.float32)
    repetition = settings.repetition_penalty[:, None]
    repeated = jnp.where(z > 0, z / repetition, z * repetition)
    z = jnp.where(seen > 0, repeated, z)
    z = z - settings.frequency_penalty[:, None] * generated
    return z - settings.presence_penalty[:, None] * (generated > 0)


def restrict(z: Array, min_p: Array, top_k: Array, top_p: Array) -> Array:
    """Logits `[rows, vocab]` with all at `-inf` but those that each row's settings leave.

    Args:
        z: float32 logits, divided by the temperature.
        min_p: float32[rows], tokens less likely than this times the likeliest go; 0 is off.
        top_k: int32[rows], then those below the k-th largest go, ties stay; 0 is off.
        top_p: float32[rows], then those go whose strictly better ones have at least this much of
            the probability that is left; 1 is off.
    """
    share = jnp.exp(z - jnp.max(z, axis=1, keepdims=True))
    z = jnp.where(share < min_p[:, None], -jnp.inf, z)
    order = _order(z)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, z.shape[1]), z.shape[1])
    least = _largest(lambda t: jnp.sum(order >= t, axis=1, dtype=jnp.int32) >= count, len(z))
    z = jnp.where(order < least, -jnp.inf, z)
    probabilities = jax.nn.softmax(z, axis=1)

    def reaches(threshold: Array) -> Array:
        return jnp.sum(jnp.where(order >= threshold, probabilities, 0.0), axis=1) >= top_p

    outside = (order < _largest(reaches, len(z))) & (top_p < 1.0)[:, None]
    return jnp.where(outside, -jnp.inf, z)


def _draw(z: Array, likeliest: Array, rows: Rows) -> tuple[Array, Array]:
    """Tokens, and the logits they were drawn from, which stay as they are for greedy rows."""
    settings = rows.settings
    hot = settings.temperature > 0.0
    scaled = z / jnp.where(hot, settings.temperature, 1.0)[:, None]
    limits = (settings.min_p, settings.top_k, settings.top_p)
    restricts = jnp.any(hot & settings.restricts)
    scaled = jax.lax.cond(restricts, restrict, lambda z, *_: z, scaled, *limits)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, z.shape[1:], jnp.float32))(_keys(rows))
    tokens = jnp.where(hot, most_likely(scaled + noise), likeliest)
    return tokens, jnp.where(hot[:, None], scaled, z)


def _keys(rows: Rows) -> Array:
    """A key a row: `fold_in(fold_in(key(seed), choice), position)`, whatever JAX's default is."""
    keys = jax.random.wrap_key_data(rows.settings.seed, impl="threefry2x32")
    for number in (rows.settings.choice, rows.positions):
        keys = jax.vmap(jax.random.fold_in)(keys, number)
    return keys


def _bits(words: Array, count: int) -> Array:
    """`bool[rows, count]` of `uint32[rows, words]`, the lowest bit first."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :count] > 0


def _order(z: Array) -> Array:
    """uint32 that compare as the floats do."""
    bits = jax.lax.bitcast_convert_type(jnp.where(z == 0.0, 0.0, z), jnp.uint32)
    negative = bits >> 31 > 0
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[Array], Array], rows: int) -> Array:
    """The largest `uint32[rows, 1]` for which `holds` (`bool[rows]`), which is so for all smaller
    ones: a bit at a time.
    """

    def bit(index: Array, found: Array) -> Array:
        more = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(holds(more)[:, None], more, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((rows, 1), jnp.uint32))
