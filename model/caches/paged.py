"""The paged cache: keys and values in pages that sequences of one flat step share (vLLM, arXiv
2309.06180), in the layout of `kernels_pallas.paged_attention`.

A step is a flat list of tokens of several sequences, prompts and decoding ones mixed. To the
decoder each token is a row of length one, `[tokens, 1]`: then nothing in it, in a mixer or in a
feed-forward knows of sequences, learned positions bound a sequence and not a step, and only this
cache, which gets the step in its `plan`, gathers a token's past. Who owns which page is the
caller's to decide.

Layers with a sliding window keep their pages as others do and see only the window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention import append, paged_attention
from model.caches.attend import DECODERS
from model.config import ModelConfig, Segment
from model.positions import PositionEncoder
from sharding import Layout, constrain

Array = jax.Array
AXES = ("layers", None, None, "kv_heads", None)
"""Logical axes of pages; a head's keys and values lie side by side, so an even cut parts heads."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedStep:
    """The tokens of one flat step, made by `paged_step`.

    positions: int32[tokens, 1], of each token in its sequence; 0 for padding.
    valid: bool[tokens, 1], False for padding, which is not stored.
    owners: int32[tokens], sequence of each token; any one for padding.
    slots: int32[tokens], where a token is stored: `page * page_size + offset`, or -1.
    page_table: int32[sequences, width], pages of each sequence; unused entries are any valid ones.
    kv_lens: int32[sequences], tokens of each sequence after this step.
    cu_q_lens: int32[sequences + 1], first token of each sequence.
    max_query_length: most tokens of one sequence; 1 for a step that only decodes, None is any.
    token_by_token: each token attends as one that decodes, so that how a prompt was cut into steps
        changes no bit of it; prompts take longer.
    """

    positions: Array
    valid: Array
    owners: Array
    slots: Array
    page_table: Array
    kv_lens: Array
    cu_q_lens: Array
    max_query_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    token_by_token: bool = dataclasses.field(default=False, metadata={"static": True})

    def of_tokens(self) -> PagedStep:
        """The same, with every token a sequence of its own that ends with it."""
        return dataclasses.replace(
            self,
            page_table=self.page_table[self.owners],
            kv_lens=jnp.where(self.valid, self.positions + 1, 0)[:, 0],
            cu_q_lens=jnp.arange(len(self.owners) + 1, dtype=jnp.int32),
            max_query_length=1,
        )


def paged_step(
    page_table: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    *,
    page_size: int,
    tokens: int,
    max_query_length: int | None = None,
    token_by_token: bool = False,
) -> PagedStep:
    """Where each of `tokens` tokens of a step stands: sequence s owns tokens `cu_q_lens[s]` to
    `cu_q_lens[s + 1]`, the newest of its `kv_lens[s]`; tokens after the last sequence's are
    padding.

    See `PagedStep` for the arguments. A sequence longer than its row of the page table has room
    for is not stored beyond it.
    """
    token = jnp.arange(tokens, dtype=jnp.int32)
    ends = cu_q_lens[1:]
    owners = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)
    owners = jnp.minimum(owners, len(kv_lens) - 1)
    valid = token < ends[-1]
    positions = jnp.where(valid, token - ends[owners] + kv_lens[owners], 0)
    place = positions // page_size
    page = page_table[owners, jnp.minimum(place, page_table.shape[1] - 1)]
    stored = valid & (place < page_table.shape[1])
    slots = jnp.where(stored, page * page_size + positions % page_size, -1)
    return PagedStep(
        positions[:, None],
        valid[:, None],
        owners,
        slots,
        page_table,
        kv_lens,
        cu_q_lens,
        max_query_length,
        token_by_token,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paged:
    """Keys (even rows, rotated) and values (odd rows) of the layers of one segment, in pages
    `[layers, pages, page_size, 2 * kv_heads, head_dim]`.
    """

    pages: Array

    def append(
        self, layer: Any, k: Array, v: Array, meta: PagedStep, encoder: PositionEncoder
    ) -> Paged:
        """Store un-rotated k and v `[tokens, 1, kv_heads, head_dim]` of a step at a layer."""
        k, v = encoder.rotate(k, meta.positions)[:, 0], v[:, 0]
        return Paged(append(k, v, self.pages, meta.slots, layer=layer))

    def attend(
        self,
        layer: Any,
        q: Array,
        meta: PagedStep,
        encoder: PositionEncoder,
        *,
        implementation: str | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> Any:
        """See `Cache.attend`: un-rotated q `[tokens, 1, heads, head_dim]`, each token to its
        sequence up to itself. `implementation` names one of attention; those without a paged kernel
        are the plain function here.
        """
        if implementation is not None:
            options["implementation"] = DECODERS.get(implementation, "plain")
        rotated = encoder.rotate(q, meta.positions)[:, 0]
        rotated = rotated.astype(jnp.promote_types(q.dtype, self.pages.dtype))
        meta = meta.of_tokens() if meta.token_by_token else meta
        options["max_query_length"] = meta.max_query_length
        call = functools.partial(_attend, options)
        if layout is not None and layout.mesh.size > 1:
            call = _by_device(call, _dividing(layout, rotated, self.pages))
        sequences = (meta.page_table, meta.kv_lens, meta.cu_q_lens)
        layer = jnp.asarray(layer, jnp.int32)
        out, lse = call(rotated, self.pages, *sequences, layer, encoder.slopes())
        out = out.astype(q.dtype)[:, None]
        return out if lse is None else (out, lse[:, None])


def _attend(options: Mapping[str, Any], *arrays: Any) -> tuple[Array, Array | None]:
    """Output and log-sum-exp; None unless asked for."""
    *inputs, layer, slopes = arrays
    out = paged_attention(*inputs, layer=layer, alibi_slopes=slopes, **options)
    return out if options.get("return_lse") else (out, None)


def _by_device(call: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Each device attends with its own heads, since the compiler cannot partition a kernel."""
    heads, stored = layout.spec((None, "heads", None)), layout.spec(AXES)
    whole = layout.spec(())
    return jax.shard_map(
        call,
        mesh=layout.mesh,
        in_specs=(heads, stored, whole, whole, whole, whole, layout.spec(("heads",))),
        out_specs=(heads, layout.spec((None, "heads"))),
        check_vma=False,
    )


def _dividing(layout: Layout, q: Array, pages: Array) -> Layout:
    """The layout with heads split as their keys are, or whole where that does not divide."""
    pieces = layout.size("kv_heads")
    even = pages.shape[3] // 2 % pieces == 0 and q.shape[1] % pieces == 0
    if even and layout.spec(("heads",)) == layout.spec(("kv_heads",)):
        return layout
    return layout.replicate("heads", "kv_heads")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """The paged caches of a decoder, which takes the place of a `DecoderCache`.

    segments: name of a segment of layers -> its `Paged`.
    planned_length: int32[], the longest that any sequence may grow; rotary scalings that depend on
        the length go by it, so that pages of one prefix serve sequences of any length.
    plan: the next step, which `hidden_states` runs and takes away.
    """

    segments: dict[str, Paged]
    planned_length: Array
    plan: PagedStep | None = None

    def step(self, shape: tuple[int, ...], segment_ids: Array | None) -> PagedStep:
        """The plan. Raises `ValueError` without one, or if the tokens are not `[tokens, 1]`."""
        if self.plan is None:
            raise ValueError("a paged cache has no plan: dataclasses.replace(cache, plan=…)")
        if shape[:2] != self.plan.positions.shape:
            raise ValueError(
                f"tokens {list(shape[:2])} in a paged cache, whose plan has "
                f"{list(self.plan.positions.shape)}: a token a row"
            )
        return self.plan

    def advance(self, segments: Mapping[str, Any], meta: PagedStep) -> PagedCache:
        """The cache after a step, with the caches that the layers returned."""
        return PagedCache({**self.segments, **segments}, self.planned_length)


def init_paged_cache(
    config: ModelConfig,
    pages: int,
    page_size: int,
    *,
    planned_length: int,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
    segments: Sequence[Segment] | None = None,
) -> PagedCache:
    """An empty cache of `pages` pages of `page_size` tokens, each of which holds all layers.

    Args:
        config: the model.
        pages, page_size: its room; the GPU kernel takes pages of 8, 16, 32 tokens or more.
        planned_length: the longest that a sequence may grow (see `PagedCache`).
        dtype: of stored keys and values.
        layout: where it lives; heads are split as the model's keys.
        segments: how the params cut the layers (`segments_of`); None is `config.segments`.

    Raises `ValueError` for no room at all.
    """
    if pages < 1 or page_size < 1:
        raise ValueError(f"a paged cache of {pages} pages of {page_size} tokens holds nothing")
    caches = {}
    for segment in segments or config.segments:
        layer = segment.layer
        assert layer.kv_heads is not None
        shape = (len(segment), pages, page_size, 2 * layer.kv_heads, layer.head_dim)
        axes = page_axes(layer.kv_heads, layout)
        caches[segment.name] = Paged(constrain(jnp.zeros(shape, dtype), axes, layout))
    return PagedCache(caches, jnp.asarray(planned_length, jnp.int32))


def page_axes(kv_heads: int, layout: Layout | None) -> tuple[str | None, ...]:
    """`AXES`, but all heads whole where they do not divide: keys and values of one never part."""
    uneven = layout is not None and kv_heads % layout.size("kv_heads")
    return (AXES[0], None, None, None, None) if uneven else AXES
