"""Layers taken apart: each a segment of its own, for a loop over tokens that reads them in place.

A loop over stacked layers cuts each layer's arrays out of their stack. On a CPU that is a copy, so
that a step of decoding, which uses each weight once, would move every weight three times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array
MOST_LAYERS = 64
"""Deeper models keep their loop: layers taken apart are compiled one by one."""


def layers_apart(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same params with every layer under a name of its own, `layers/000-001/…`.

    Arrays are `[1, …]` in the memory of their stacks, nothing is copied: all must be on one CPU.
    """
    layers: dict[str, Any] = {}
    for name, stack in params["layers"].items():
        leaves, tree = jax.tree.flatten(stack)
        start = int(name.partition("-")[0])
        for layer, own in enumerate(zip(*map(_views, leaves), strict=True), start):
            layers[f"{layer:03d}-{layer + 1:03d}"] = jax.tree.unflatten(tree, own)
    return {**params, "layers": layers}


def can_be_apart(params: Mapping[str, Any]) -> bool:
    """Whether the layers are few enough, and whole arrays on one CPU (not traced, not sharded)."""
    leaves = jax.tree.leaves(params["layers"])
    return (
        all(map(_on_one_cpu, leaves))
        and sum(jax.tree.leaves(stack)[0].shape[0] for stack in params["layers"].values())
        <= MOST_LAYERS
    )


def _on_one_cpu(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _views(stack: Array) -> list[Array]:
    """`[1, …]` of each layer, where the stack lies."""
    host = np.asarray(stack)
    return [
        jax.device_put(host[layer : layer + 1], stack.sharding, may_alias=True)
        for layer in range(len(host))
    ]
