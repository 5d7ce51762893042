"""The same function with outlier channels, as large models have them and small ones do not.

What quantizes activations can only be judged where some channels are far larger than the rest, so
small models are given such channels: a gain of a norm is multiplied, and the rows that read it are
divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import ModelConfig, Runtime
from surgery import blocks
from surgery.quantize.transforms import fold_of, scale
from surgery.source import InMemory


def inject_outliers(
    config: ModelConfig,
    params: Mapping[str, Any],
    channels: int = 4,
    factor: float = 60.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Params of the same function whose normed streams have `channels` outliers of `factor` times
    their size; the channels are drawn anew for each norm.
    """
    source, rng = InMemory(config, params), np.random.default_rng(seed)
    layers = {}
    for segment in config.segments:
        found = []
        for index in range(segment.start, segment.stop):
            layer, done = source.layer(index), set()
            for site in blocks.sites(layer, segment.layer, Runtime()):
                fold = fold_of(layer, segment.layer, site)
                if fold is None or fold.kind == "linear" or fold.maker in done:
                    continue
                chosen = rng.choice(config.d_model, channels, replace=False)
                s = jnp.ones(config.d_model).at[chosen].set(1 / factor)
                layer = scale(layer, fold, s)
                done.add(fold.maker)
            found.append(layer)
        layers[segment.name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return {**source.outer(), "layers": layers}
