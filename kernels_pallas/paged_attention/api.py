"""Ragged paged attention by the best implementation for the device; every one computes what
`reference.paged_attention` defines. And the storing of keys and values in pages.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import door
from kernels_pallas.decode_attention.api import split
from kernels_pallas.decode_attention.softmax import Softmax
from kernels_pallas.paged_attention import gpu, reference, storing, tpu

Array = jax.Array

OPERATION = door.Operation(
    "paged_attention",
    reference.paged_attention,
    {"tpu": tpu.paged_attention, "gpu": gpu.paged_attention},
    {"tpu": tpu.obstacle, "gpu": gpu.obstacle},
)
APPEND = door.Operation("append", storing.plain, {"tpu": storing.on_tpu}, {"tpu": lambda *_: None})
IMPLEMENTATIONS = ("plain", *OPERATION.kernels)


def paged_attention(
    q: Array,
    pages: Array,
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    *,
    layer: Any = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    max_query_length: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """See `reference.paged_attention`. implementation: a name in `IMPLEMENTATIONS`; None takes the
    kernel of the platform where it serves, else the plain function with one warning.
    """
    reference.check(
        q, pages, page_table, kv_lens, cu_q_lens, layer, softmax, causal, window, alibi_slopes
    )
    arguments = {"q": q, "pages": pages, "page_table": page_table, "kv_lens": kv_lens}
    arguments |= {"cu_q_lens": cu_q_lens, "alibi_slopes": alibi_slopes}
    options = {"causal": causal, "window": window, "sinks": sinks, "soft_cap": soft_cap}
    options |= {"scale": scale, "max_query_length": max_query_length, "return_lse": return_lse}
    return door.call(OPERATION, implementation, *split(arguments, options, layer, softmax))


def append(
    k: Array,
    v: Array,
    pages: Array,
    slots: Array,
    *,
    layer: Any = None,
    implementation: str | None = None,
) -> Array:
    """See `storing.plain`: k and v `[tokens, kv_heads, head_dim]` in slots of `pages`, which are
    written in place where they are donated.
    """
    storing.check(k, v, pages, slots, layer)
    arguments = {"k": k, "v": v, "pages": pages, "slots": slots, "layer": layer}
    return door.call(APPEND, implementation, arguments, {})
