"""What shared-prefix attention costs: a group's pages once, whatever its members.

The tokens read fall from `B (P + S)` to `P + B S` for B sequences of a common beginning of P and a
rest of S; the operations stay. The product with the beginning has an intensity of `group * B`
operations a byte with bfloat16, so beyond the chip's ridge more members cost time again.
"""

from __future__ import annotations

from typing import Any

from kernels_pallas.paged_attention.cost import paged_attention


def shared_prefix_attention(
    q: Any, pages: Any, *, group_tokens: int, suffix_tokens: int, pairs: int
) -> tuple[float, float]:
    """`(flops, bytes)` of one call.

    Args:
        q: `[tokens, heads, head_dim]`, or anything with its shape and dtype.
        pages: `[..., page_size, 2 * kv_heads, head_dim]`.
        group_tokens: of all groups.
        suffix_tokens: that the groups do not cover, summed over the sequences.
        pairs: of a query and a key that it sees.
    """
    flops, read = paged_attention(q, pages, cached_tokens=group_tokens + suffix_tokens, pairs=pairs)
    tokens, heads, dim = q.shape
    partial = 2 * tokens * heads * (2 * dim * 2 + 2 * 4)  # one more part, written and read
    return flops, read + partial
