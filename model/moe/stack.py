"""Experts of a stack of layers, for a loop over layers that takes none it does not need.

The loop cuts each layer's arrays out of the stack. For a decoding step, which needs few of many
experts, that would read and write all of them, so they stay in the stack and are picked there. A
training step needs them all, and the gradient of what is cut out is cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from weights import OfLayer, is_weight

Params = Mapping[str, Any]


def set_apart(stack: Params) -> tuple[Params, Params]:
    """A segment's params without its experts, and `{part: experts}` of the parts that have some."""
    experts = {name: part["experts"] for name, part in stack.items() if "experts" in part}
    rest = {
        name: {key: value for key, value in part.items() if key != "experts"}
        for name, part in stack.items()
    }
    return rest, experts


def put_back(layer_params: Params, experts: Params, layer: Any) -> Params:
    """One layer's params with its experts, still in their stack."""
    found = dict(layer_params)
    for name, stack in experts.items():
        own = jax.tree.map(lambda leaf: OfLayer(leaf, layer), stack, is_leaf=is_weight)
        found[name] = {**layer_params[name], "experts": own}
    return found
