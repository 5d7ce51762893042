"""The next token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; None is all.
    top_p: only the most likely tokens whose probabilities reach p in sum; None is all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be at least 1, or None")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be in (0, 1], or None")


GREEDY = Sampling()
"""The most likely token."""


def sample(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """One token for each row: logits `float32[batch, vocab]`, a key a row, to `int32[batch]`.

    A row's token depends on its own logits and key only, so it does not change with the batch
    around it.
    """
    if sampling.temperature == 0.0:
        return most_likely(logits)
    logits = restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def most_likely(logits: Array) -> Array:
    """The first of the largest logits, `[batch, vocab]` to `int32[batch]`.

    As `argmax`, in two reductions of single values, which a CPU vectorises; a row of NaN gives the
    last token.
    """
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, ids, logits.shape[-1] - 1), axis=-1)


def restrict(logits: Array, top_k: int | None, top_p: float | None) -> Array:
    """Logits `[batch, vocab]` with tokens outside the top k, then outside the top-p nucleus, at
    `-inf`.

    The nucleus is the shortest run of most likely tokens whose probabilities sum to at least p
    (Holtzman et al. 2020).
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1.0:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        count = jnp.sum(before < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, count - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
