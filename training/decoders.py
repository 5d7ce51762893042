"""The `apply` of an objective for Sheaf's decoder: what of a batch the model reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from model import ModelConfig, Runtime, hidden_states, logits
from training.objectives import Apply, Batch


def decoder(config: ModelConfig, runtime: Runtime | None = None, *, head: bool = True) -> Apply:
    """`apply(params, batch, rng) -> (logits float32[batch, length, vocab], aux)`.

    Reads `tokens`, and `positions` and `segment_ids` if the batch has them. Without `head` it gives
    `(hidden, {"head": hidden -> logits, …})`, so that a chunked loss never holds all logits.
    """
    runtime = runtime or Runtime()

    def apply(
        params: Any, batch: Batch, rng: jax.Array | None
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        hidden, aux = hidden_states(
            params,
            batch["tokens"],
            config,
            runtime,
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            rng=rng,
        )
        if head:
            return logits(params, hidden, config, runtime), aux
        return hidden, {**aux, "head": lambda x: logits(params, x, config, runtime)}

    return apply
