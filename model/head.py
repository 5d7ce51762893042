"""The head: what turns the last hidden state into logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.runtime import DEFAULT_RUNTIME, Runtime
from sharding import constrain
from weights import bias_add, dequantize, linear, matmul, unembed

Array = jax.Array
SMALLEST_LENGTH = 1e-12
"""A shorter row of the head is divided by this, as `torch.nn.functional.normalize` does."""


def logits(
    params: Mapping[str, Any],
    hidden: Array,
    config: ModelConfig,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Array:
    """`[..., length, d_model] -> float32[..., length, vocab]`: projection to `d_embed`, head or
    tied table, row lengths, bias, scale, soft cap; each if the config has it.
    """
    if config.d_embed is not None:
        hidden = linear(params["head_projection"], hidden)
    if config.tied_embeddings:
        scores = unembed(params["embed"], hidden, jnp.float32)
    else:
        scores = matmul(hidden, params["head"]["kernel"], dtype=jnp.float32)
    if config.head_norm == "row_normalised":
        scores = scores * _inverse_lengths(params, config)
    if not config.tied_embeddings:
        scores = bias_add(scores, params["head"])
    if config.logit_scale != 1.0:
        scores = scores * config.logit_scale
    if config.logit_soft_cap is not None:
        scores = config.logit_soft_cap * jnp.tanh(scores / config.logit_soft_cap)
    return constrain(scores, ("batch", "length", "vocab"), runtime.layout)


def _inverse_lengths(params: Mapping[str, Any], config: ModelConfig) -> Array:
    """`float32[vocab]`: one over the L2 length of each token's row of the head.

    Multiplying the scores by it normalises the rows without a second head in memory.
    """
    tied = config.tied_embeddings
    weight = params["embed"]["table"] if tied else params["head"]["kernel"]
    wide = dequantize(weight, jnp.float32)
    squares = jnp.sum(jnp.square(wide), axis=1 if tied else 0)
    return jax.lax.rsqrt(jnp.maximum(squares, SMALLEST_LENGTH**2))
