"""Shared-prefix attention by the best implementation for the device; every one computes what
`reference.shared_prefix_attention` defines.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import door
from kernels_pallas.decode_attention.api import split
from kernels_pallas.decode_attention.softmax import Softmax
from kernels_pallas.paged_attention import reference as paged
from kernels_pallas.shared_prefix import gpu, reference, tpu
from kernels_pallas.shared_prefix.reference import Groups

Array = jax.Array

OPERATION = door.Operation(
    "shared_prefix_attention",
    reference.shared_prefix_attention,
    {"tpu": tpu.shared_prefix_attention, "gpu": gpu.shared_prefix_attention},
    {"tpu": tpu.obstacle, "gpu": gpu.obstacle},
)
IMPLEMENTATIONS = ("plain", *OPERATION.kernels)


def shared_prefix_attention(
    q: Array,
    pages: Array,
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    groups: Groups,
    *,
    layer: Any = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    max_query_length: int | None = None,
    suffix_width: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """See `reference.shared_prefix_attention`. implementation: a name in `IMPLEMENTATIONS`; None
    takes the kernel of the platform where it serves, else the plain function with one warning.
    """
    paged.check(q, pages, page_table, kv_lens, cu_q_lens, layer, softmax, True, None, None)
    reference.check(q, page_table, groups)
    arguments = {"q": q, "pages": pages, "page_table": page_table, "kv_lens": kv_lens}
    arguments |= {"cu_q_lens": cu_q_lens, "groups": groups}
    options = {"soft_cap": soft_cap, "scale": scale, "max_query_length": max_query_length}
    options |= {"suffix_width": suffix_width, "return_lse": return_lse}
    return door.call(OPERATION, implementation, *split(arguments, options, layer, softmax))
