"""Attention of sequences that begin alike (Hydragen, arXiv 2402.05099, section 3): the keys of a
common beginning are read once for all its sequences.

Attention over disjoint pieces of the keys merges by the log-sum-exps of the pieces. The members of
a group are one sequence of queries to the group's pages, without a causal mask, since all of them
come later; what follows the beginning is ordinary ragged attention. Groups may be nested: a level
is a set of groups without common members, and level 0 is nearest to the root.

With `m` members and a beginning of p tokens, each layer reads `(m - 1) * p` tokens less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import merge
from kernels_pallas.decode_attention.softmax import Softmax
from kernels_pallas.paged_attention import reference

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Which tokens of a step share which pages.

    pages: `int32[levels, groups, width]`, page numbers of each group.
    lens: `int32[levels, groups]`, tokens of each group, whole pages of them; 0 for one not used.
    cu_rows: `int32[levels, groups + 1]`, first member of each group in `rows`; those of groups that
        are not used repeat the last.
    rows: `int32[levels, tokens]`, the members, group by group; -1 beyond the last.
    suffix_start: `int32[sequences]`, tokens of each sequence that its groups cover.
    """

    pages: Array
    lens: Array
    cu_rows: Array
    rows: Array
    suffix_start: Array


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
    attention: Callable[..., Any] = reference.paged_attention,
) -> Any:
    """What `paged_attention` gives, with the pages of groups read once a group.

    Args:
        q, pages, page_table, kv_lens, cu_q_lens, layer, soft_cap, scale, softmax, max_query_length:
            as `paged_attention` takes them.
        groups: see `Groups`. A group's tokens come before those of the step.
        suffix_width: most pages of a sequence that its groups do not cover; None is the width of
            the page table.
        return_lse: also return the log-sum-exp of the scores.
        attention: by which the pieces are computed.

    Returns:
        `[tokens, heads, head_dim]` in `q.dtype`, and with `return_lse` also `float32[tokens,
        heads]`.
    """
    check(q, page_table, groups)
    shared = {"layer": layer, "soft_cap": soft_cap, "scale": scale, "softmax": softmax}
    table = _suffix_table(page_table, groups.suffix_start // pages.shape[-3], suffix_width)
    suffix = attention(
        q,
        pages,
        table,
        jnp.maximum(kv_lens - groups.suffix_start, 0),
        cu_q_lens,
        max_query_length=max_query_length,
        return_lse=True,
        **shared,
    )
    parts = [suffix]
    for level in range(groups.rows.shape[0]):
        part = attention(
            jnp.take(q, groups.rows[level], axis=0, mode="clip"),
            pages,
            groups.pages[level],
            groups.lens[level],
            groups.cu_rows[level],
            causal=False,
            return_lse=True,
            **shared,
        )
        parts.append(_in_place(part, groups.rows[level]))
    out, lse = merge(*zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _suffix_table(page_table: Array, skipped: Array, width: int | None) -> Array:
    """Each row of the table from its suffix's first page on."""
    columns = jnp.arange(width or page_table.shape[1], dtype=jnp.int32)
    wanted = jnp.minimum(skipped[:, None] + columns, page_table.shape[1] - 1)
    return jnp.take_along_axis(page_table, wanted, axis=1)


def _in_place(part: tuple[Array, Array], rows: Array) -> tuple[Array, Array]:
    """Members' results where their tokens stand; the others see nothing."""
    out, lse = part
    rows = jnp.where(rows < 0, len(rows), rows)
    return (
        jnp.zeros_like(out).at[rows].set(out, mode="drop"),
        jnp.full_like(lse, -jnp.inf).at[rows].set(lse, mode="drop"),
    )


def check(q: Array, page_table: Array, groups: Groups) -> None:
    """Raises `ValueError` that names the field and what would be right."""
    levels, count = groups.lens.shape
    expected = {
        "pages": (levels, count, groups.pages.shape[-1]),
        "cu_rows": (levels, count + 1),
        "rows": (levels, len(q)),
        "suffix_start": (len(page_table),),
    }
    for name, shape in expected.items():
        found = getattr(groups, name).shape
        if found != shape:
            raise ValueError(
                f"groups.{name} has shape {found}; expected {shape} for {levels} levels of {count} "
                f"groups, {len(q)} tokens and {len(page_table)} sequences"
            )
