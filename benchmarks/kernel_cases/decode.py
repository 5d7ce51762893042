"""Decode, paged, shared-prefix and quantized attention, as steps of published models ask for
them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_case import Case, Rival
from kernels_pallas import kv_quant
from kernels_pallas.decode_attention import SHAPES as DECODE
from kernels_pallas.decode_attention import Unified, decode_attention
from kernels_pallas.decode_attention import cost as decode_cost
from kernels_pallas.kv_quant import cost as quantized_cost
from kernels_pallas.paged_attention import SHAPES as PAGED
from kernels_pallas.paged_attention import cost as paged_cost
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.shared_prefix import SHAPES as SHARED
from kernels_pallas.shared_prefix import Groups, shared_prefix_attention
from kernels_pallas.shared_prefix import cost as shared_cost

PAGE = 128
"""Tokens of a page of the library's, where ours has none."""
LAYERS = 2
"""Of a cache: more than one, since a copy of a layer would be a fault."""


def cases() -> list[Case]:
    """Each with the library's kernel where there is one."""
    return [
        decode("llama3_8b"),
        decode("llama3_8b", unified=True),
        decode("llama2_7b"),
        decode("lm_infinite"),
        paged("llama3_8b_decode"),
        paged("llama3_8b_mixed"),
        prefix("llama3_8b_system_prompt"),
        quantized("llama3_8b_8bit"),
        quantized("llama3_8b_2bit"),
    ]


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def whole(*shape: int) -> jax.ShapeDtypeStruct:
    return array(*shape, dtype=jnp.int32)


def decode(name: str, unified: bool = False) -> Case:
    """A token a sequence to a dense cache."""
    s = DECODE[name]
    q = array(s.batch, s.queries, s.heads, s.head_dim)
    k = array(LAYERS, s.batch, s.kv_heads, s.slots, s.head_dim)
    seen = s.batch * (s.slots if s.window is None else s.window + s.sinks)

    def run(q: Any, k: Any, v: Any, lengths: Any, layer: Any) -> Any:
        softmax = Unified(jnp.zeros(s.heads)) if unified else "online"
        options = {"window": s.window, "sinks": s.sinks, "softmax": softmax}
        return decode_attention(q, k, v, lengths, layer=layer, **options)

    label = f"decode, {name}" + (", unified" if unified else "")
    cost = decode_cost.decode_attention(q, k.update(shape=k.shape[1:]), k, tokens=seen)
    shapes = (q, k, k, whole(s.batch), whole())
    plain = s.window is None and not unified
    return Case(label, run, shapes, *cost, library=library_decode(s) if plain else None)


def library_decode(s: Any) -> Rival:
    """JAX's own over pages, one layer of them; they stand for the dense cache, or for one of 8
    bits.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils

    length = getattr(s, "slots", None) or s.length
    width = length // PAGE
    lead = (s.kv_heads, s.batch * width, PAGE)
    pages: Any = array(*lead, s.head_dim)
    if hasattr(s, "bits"):
        codes = array(*lead, s.head_dim, dtype=jnp.int8)
        pages = quantization_utils.QuantizedTensor(codes, array(*lead, 1, dtype=jnp.float32))
    q = array(s.batch, s.heads, s.head_dim)
    run = functools.partial(paged_attention, pages_per_compute_block=8)
    return Rival("paged_attention", run, (q, pages, pages, whole(s.batch), whole(s.batch, width)))


def step_of(name: str) -> tuple[Any, tuple[Any, ...], int, int]:
    """A paged step: its sizes, its arrays, the tokens read and the pairs that see each other."""
    s = PAGED[name]
    width = -(-s.length // s.page_size)
    arrays = (
        array(s.tokens, s.heads, s.head_dim),
        array(LAYERS, s.sequences * width, s.page_size, 2 * s.kv_heads, s.head_dim),
        whole(s.sequences, width),
        whole(s.sequences),
        whole(s.sequences + 1),
    )
    own = s.prompt_tokens * (s.length - s.prompt_tokens // 2)
    return s, arrays, s.sequences * s.length, s.decoding * s.length + s.prompts * own


def paged(name: str) -> Case:
    """A step of decoding sequences and prompts, with the library's kernel for one layer's pages."""
    s, arrays, read, pairs = step_of(name)
    longest = max(1, s.prompt_tokens)

    def run(*arrays: Any) -> Any:
        return paged_attention(
            *arrays[:-1], layer=arrays[-1], max_query_length=longest, return_lse=True
        )

    cost = paged_cost.paged_attention(*arrays[:2], cached_tokens=read, pairs=pairs)
    return Case(f"paged, {name}", run, (*arrays, whole()), *cost, library=library_paged(*arrays))


def library_paged(q: Any, pages: Any, table: Any, lens: Any, starts: Any) -> Rival:
    """JAX's own, over one layer's pages; it has neither a log-sum-exp nor a layer axis, and finds
    block sizes only on a TPU at hand.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    sizes = {"num_kv_pages_per_block": 32, "num_queries_per_block": 32}
    run = functools.partial(ragged_paged_attention, **sizes, vmem_limit_bytes=64 * 2**20)
    pages = pages.update(shape=pages.shape[1:])
    return Rival("ragged_paged_attention", run, (q, pages, lens, table, starts, whole(1)))


def prefix(name: str) -> Case:
    """A decoding step of one group, beside the library's, which reads the group's pages for each
    sequence.
    """
    s = SHARED[name]
    first, rest = s.prefix // s.page_size, -(-s.suffix // s.page_size)
    q = array(s.members, s.heads, s.head_dim)
    pages = array(LAYERS, first + s.members * rest, s.page_size, 2 * s.kv_heads, s.head_dim)
    groups = Groups(
        whole(1, 1, first), whole(1, 1), whole(1, 2), whole(1, s.members), whole(s.members)
    )
    step = (whole(s.members, first + rest), whole(s.members), whole(s.members + 1))

    def run(*arrays: Any) -> Any:
        return shared_prefix_attention(
            *arrays[:-1], layer=arrays[-1], max_query_length=1, suffix_width=rest
        )

    cost = shared_cost.shared_prefix_attention(
        q,
        pages,
        group_tokens=s.prefix,
        suffix_tokens=s.members * s.suffix,
        pairs=s.members * (s.prefix + s.suffix),
    )
    shapes = (q, pages, *step, groups, whole())
    return Case(
        f"shared prefix, {name}", run, shapes, *cost, library=library_paged(q, pages, *step)
    )


def quantized(name: str) -> Case:
    """A token a sequence to quantized pages; XLA reads the pages back and attends to them."""
    s = kv_quant.SHAPES[name]
    width = -(-s.length // s.page_size)
    sizes = (LAYERS, s.batch * width, s.kv_heads, s.page_size, s.head_dim)
    empty = functools.partial(kv_quant.KiviPages.empty, *sizes, bits=s.bits)
    if s.bits == 8:
        empty = functools.partial(kv_quant.Int8Pages.empty, *sizes)
    pages = jax.eval_shape(empty)
    q = array(s.batch, s.queries, s.heads, s.head_dim)

    def by(implementation: str | None) -> Any:
        return lambda *arrays: kv_quant.quantized_attention(
            *arrays[:-1], layer=arrays[-1], return_lse=True, implementation=implementation
        )

    cost = quantized_cost.quantized_attention(q, pages, cached_tokens=s.batch * s.length)
    shapes = (q, pages, whole(s.batch, width), whole(s.batch), whole())
    return Case(
        f"quantized pages, {name}",
        by(None),
        shapes,
        *cost,
        library=library_decode(s) if s.bits == 8 else None,
        xla=Rival("XLA", by("plain")),
    )
