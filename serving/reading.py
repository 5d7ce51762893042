"""What a step tells of prompts, rather than of their answers: the log-probability of each of their
tokens, and sums of hidden states, of which vectors are made.

Prompts are read chunk by chunk in the same steps in which others decode, so a long one stalls
nobody and needs no memory of its own. The head runs on a block of rows at a time, so logits of a
whole chunk are never there together; a step that scores no prompt skips it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.caches.paged import PagedStep
from serving.sampling import Read, Sampled, Variant, drawable, with_logprobs

Array = jax.Array
Tokens = tuple[Array, Array, Array]
ROWS = 256
"""Rows that the head runs on at a time."""


def read_prompts(
    tokens: Tokens,
    plan: PagedStep,
    scores: Array,
    head: Callable[[Array, Array], Array],
    variant: Variant,
) -> Read:
    """What the tokens of a step tell.

    Args:
        tokens: hidden states [tokens, d_model] after the final norm; int32[tokens], the token after
            each in its sequence; and int32[tokens], the number of its adapter.
        plan: whose token each is.
        scores: bool[sequences], whose tokens get log-probabilities; zeros if nobody's.
        head: from `[rows, d_model]` and numbers of adapters to logits `[rows, vocab]`.
        variant: how many likeliest tokens come back.
    """

    def scored() -> Sampled:
        return _scored(tokens, head, variant)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(scored))
    following_scored = jax.lax.cond(jnp.any(scores), scored, lambda: zeros)
    return Read(following_scored, *_sums(tokens[0], plan))


def _scored(tokens: Tokens, head: Any, variant: Variant) -> Sampled:
    """The following tokens as if they had been sampled, from the model's own distribution."""
    count = len(tokens[0])
    size = min(ROWS, count)

    def blocks(leaf: Array) -> Array:
        padded = jnp.pad(leaf, ((0, -count % size), *[(0, 0)] * (leaf.ndim - 1)))
        return padded.reshape(-1, size, *leaf.shape[1:])

    def one(block: Tokens) -> Sampled:
        rows, following, adapters = block
        z = drawable(head(rows, adapters), variant)
        return with_logprobs(following, z, variant.logprobs or 0)

    found = jax.lax.map(one, jax.tree.map(blocks, tokens))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], found)


def _sums(hidden: Array, plan: PagedStep) -> tuple[Array, Array]:
    """float32[sequences, d_model]: the sum over each one's tokens, and its last token's state."""
    states = hidden.astype(jnp.float32)
    mine = jnp.where(plan.valid, states, 0.0)
    sums = jax.ops.segment_sum(mine, plan.owners, num_segments=len(plan.cu_q_lens) - 1)
    return sums, states[jnp.maximum(plan.cu_q_lens[1:] - 1, 0)]
