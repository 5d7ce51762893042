"""cuDNN's attention, through `jax.nn.dot_product_attention`, where it means the same as ours.

It masks by place in the array, not by position: a causal call aligns first query and first key,
windows reach to the left only, and there are no documents. Whether the tokens of a call are in
plain order is data, so it is decided on the device, and the chunked engine takes the other calls.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import flash

Array = jax.Array


def obstacle(q: Array, k: Array, v: Array, options: dict[str, Any]) -> str | None:
    """Why cuDNN's is another function, whatever the order of the tokens; None if it may be ours."""
    for name in ("soft_cap", "alibi_slopes", "return_lse", "sinks"):
        value = options.get(name)
        if value is not None and value is not False and not (name == "sinks" and value == 0):
            return f"it has no {name}"
    kinds = {x.dtype for x in (q, k, v)}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"q, k and v are {sorted(map(str, kinds))}; it takes bfloat16 or float16"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8:
        return f"head_dim {q.shape[-1]} and value_dim {v.shape[-1]} must be the same multiple of 8"
    causal, window = options.get("causal", True), options.get("window")
    if causal and q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries and {k.shape[1]} keys: it aligns their beginnings"
    if window is not None and not causal:
        return "its windows are causal"
    return None


def attention(q: Array, k: Array, v: Array, *, library: str = "cudnn", **options: Any) -> Array:
    """`reference.attention`; raises `ValueError` where `obstacle` says why.

    library: implementation of `jax.nn.dot_product_attention`.
    """
    reason = obstacle(q, k, v, options)
    if reason is not None:
        raise ValueError(f"attention implementation 'cudnn': {reason}")
    causal, window = options.get("causal", True), options.get("window")

    def by_library(q: Array, k: Array, v: Array) -> Array:
        attend: Any = jax.nn.dot_product_attention
        return attend(
            q, k, v, scale=options.get("scale"), is_causal=causal, implementation=library,
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    def by_block(q: Array, k: Array, v: Array) -> Array:
        return flash.chunked(q, k, v, **options)

    return jax.lax.cond(_in_order(options, causal), by_library, by_block, q, k, v)


def _in_order(options: dict[str, Any], causal: bool) -> Array:
    """Whether every row is one document without padding and, where order matters, its positions
    follow one another.
    """
    queries, keys = options["query_positions"], options["key_positions"]
    conditions = []
    if causal:
        conditions += [jnp.all(queries == keys), jnp.all(jnp.diff(keys, axis=1) == 1)]
    rows, columns = (options.get(f"{name}_segment_ids") for name in ("query", "key"))
    if rows is not None and columns is not None:
        conditions += [jnp.all(x == rows[:, :1]) for x in (rows, columns)]
        conditions.append(jnp.all(rows > 0))
    return jnp.all(jnp.stack(conditions)) if conditions else jnp.asarray(True)
