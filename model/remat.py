"""Rematerialisation by name: which activations of a block are kept for the backward pass, and which
recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from sharding import SECONDARY

ATTENTION_OUTPUT = "attention_output"
"""Name under which the attention part marks its output, for policies that keep it."""

EXPERT_PRODUCT = "expert_product"
"""Name of the products of a mixture's experts, which run in loops that policies cannot see into."""

_policies = jax.checkpoint_policies
_kept = _policies.save_only_these_names

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": _policies.everything_saveable,
    "full": _kept(SECONDARY),
    "dots": _policies.save_from_both_policies(
        _policies.dots_saveable, _kept(EXPERT_PRODUCT, SECONDARY)
    ),
    "dots_no_batch": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _kept(EXPERT_PRODUCT, SECONDARY)
    ),
    "save_attention": _kept(ATTENTION_OUTPUT, SECONDARY),
}
"""Name -> what is kept: everything, nothing, all products, products with a weight, the attention
outputs; and always the secondary copies of weights, where a run asks for them.
"""


def remat(function: Callable[..., Any], policy: str, *, in_loop: bool) -> Callable[..., Any]:
    """`function` under the policy `policy`; the function itself under "none".

    Outside a loop the compiler must be kept from merging what is recomputed with the first run of
    it; in a loop it cannot, and the barriers would only cost time.
    """
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=not in_loop)
