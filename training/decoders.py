"""Sheaf's decoder as objectives and pipelines call it: what of a batch the model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from model import ModelConfig, Runtime, hidden_states, logits, staged
from model.parameters import describe
from sharding import Gathered, Layout, local_layout
from training.chunked_loss import Head
from training.objectives import Apply, Batch
from training.staged import Staged
from weights import paths


def decoder(config: ModelConfig, runtime: Runtime | None = None, *, head: bool = True) -> Apply:
    """`apply(params, batch, rng) -> (logits float32[batch, length, vocab], aux)`.

    Reads `tokens`, and `positions` and `segment_ids` if the batch has them. Without `head` it gives
    `(hidden, {"head": Head, …})`, so that a chunked loss never holds all logits.
    """
    runtime = runtime or Runtime()

    def apply(
        params: Any, batch: Batch, rng: jax.Array | None
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        here = dataclasses.replace(runtime, layout=local_layout(runtime.layout))
        hidden, aux = hidden_states(
            params,
            batch["tokens"],
            config,
            here,
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            rng=rng,
        )
        if head:
            return logits(params, hidden, config, here), aux
        return hidden, {**aux, "head": _head(params, config, here)}

    return apply


def _head(params: Any, config: ModelConfig, runtime: Runtime) -> Head:
    """The head with its own arrays, and where their gradients belong."""
    layout, described = runtime.layout, describe(config)
    names = ("head_projection", "embed" if config.tied_embeddings else "head")
    own = {name: params[name] for name in names if name in params}
    # Gathered here, or each piece of the tokens would gather it and reduce its gradient again.
    own = jax.tree.map(_whole, own, is_leaf=lambda node: isinstance(node, Gathered))

    def function(own: Any, hidden: jax.Array, layout: Layout | None) -> jax.Array:
        return logits(own, hidden, config, dataclasses.replace(runtime, layout=layout))

    def place(path: str) -> NamedSharding:
        assert layout is not None
        return layout.sharding(described[path][0].axes, "gradients")

    known = layout is not None and all(path in described for path in paths(own))
    return Head(own, function, layout, tuple(map(place, paths(own))) if known else ())


def _whole(node: Any) -> Any:
    return node.dequantize() if isinstance(node, Gathered) else node


def staged_decoder(config: ModelConfig, runtime: Runtime | None = None) -> Staged:
    """The same model in the parts that a pipeline runs (`training.staged`).

    Its functions raise `ValueError` for a model whose layers are not one stack of one kind.
    """
    runtime = runtime or Runtime()

    def on(layout: Layout | None) -> Runtime:
        return dataclasses.replace(runtime, layout=layout)

    def stack(params: Any) -> Any:
        name = staged.only_segment(config).name
        if set(params["layers"]) != {name}:
            raise ValueError(
                f"the params stack their layers as {', '.join(sorted(params['layers']))}; "
                f"mesh.stage above 1 needs them as {name}"
            )
        return params["layers"][name]

    return Staged(
        layers=config.num_layers,
        stack=stack,
        rest=lambda params: {name: tree for name, tree in params.items() if name != "layers"},
        join=lambda rest, stack: {**rest, "layers": {staged.only_segment(config).name: stack}},
        enter=lambda params, batch, rng, layout: staged.enter(
            params, batch, rng, config, on(layout)
        ),
        run=lambda params, x, first, batch, rng, layout, count=None: staged.run_layers(
            params, x, first, batch, rng, staged.only_segment(config), on(layout), count
        ),
        leave=lambda params, x, layout: staged.leave(params, x, config, on(layout)),
    )
