"""Attention to pages on a GPU: ragged steps, shared prefixes and quantized pages.

Unused entries of page tables point to page 0, which no sequence owns; for the kernel it is NaN, and
so is what lies beyond a sequence's length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_case import (
    DEQUANTIZED_LOG_SUM_EXP,
    HALF,
    LOG_SUM_EXP,
    TWICE,
    GpuCase,
    Rival,
    Speed,
    normal,
)
from kernels_pallas import kv_quant
from kernels_pallas.kv_quant import cost as quantized_cost
from kernels_pallas.paged_attention import IMPLEMENTATIONS as PAGED_IMPLEMENTATIONS
from kernels_pallas.paged_attention import SHAPES as PAGED
from kernels_pallas.paged_attention import PagedShape, paged_attention
from kernels_pallas.paged_attention import cost as paged_cost
from kernels_pallas.shared_prefix import IMPLEMENTATIONS as SHARED_IMPLEMENTATIONS
from kernels_pallas.shared_prefix import SHAPES as SHARED
from kernels_pallas.shared_prefix import Groups, SharedPrefixShape, shared_prefix_attention
from kernels_pallas.shared_prefix import cost as shared_cost

Array = jax.Array

LAYERS, LAYER = 2, 1
PARTS = (1.0, 0.51, 0.03, 0.77, 0.26)
"""Of the longest sequence, in turn."""
RAGGED: dict[str, tuple[PagedShape, dict[str, Any]]] = {
    "decoding": (PagedShape(7, 0, 0, 500, 16, 16, 4, 128), {}),
    "mixed": (PagedShape(5, 2, 150, 400, 16, 16, 4, 128), {}),
    "large pages": (PagedShape(4, 1, 70, 600, 128, 8, 2, 64), {"soft_cap": 20.0}),
    "window and sinks": (PagedShape(5, 1, 90, 600, 16, 8, 2, 128), {"window": 100, "sinks": 4}),
}
"""Name -> sizes and options of a call that is checked."""
QUANTIZED: dict[str, kv_quant.QuantizedShape] = {
    "8 bits": kv_quant.QuantizedShape(5, 1, 700, 128, 16, 4, 128, 8),
    "4 bits": kv_quant.QuantizedShape(5, 2, 700, 128, 16, 4, 128, 4),
    "2 bits": kv_quant.QuantizedShape(5, 1, 700, 128, 16, 4, 128, 2),
}


def cases(tiny: bool) -> list[GpuCase]:
    """tiny: of sizes that a CPU is done with at once."""
    few = {"heads": 4, "kv_heads": 2}
    found = []
    for name in ("llama3_8b_decode", "llama3_8b_large_pages", "llama3_8b_mixed"):
        small = replace(PAGED[name], decoding=2, length=64, page_size=16, prompt_tokens=20, **few)
        found.append(timed_step(name, small if tiny else PAGED[name]))
    small = replace(SHARED["llama3_8b_system_prompt"], members=3, prefix=32, suffix=20, **few)
    shared = {"llama3_8b_system_prompt": SHARED["llama3_8b_system_prompt"]}
    found += [prefix(name, small if tiny else shape) for name, shape in shared.items()]
    for name in ("llama3_8b_8bit", "llama3_8b_4bit", "llama3_8b_2bit"):
        found.append(quantized(name, fit(kv_quant.SHAPES[name]) if tiny else kv_quant.SHAPES[name]))
    for name, (shape, options) in RAGGED.items():
        small = replace(shape, decoding=2, length=64, page_size=16, prompt_tokens=20, **few)
        found.append(ragged_step(name, small if tiny else shape, options))
    found += [
        quantized(name, fit(shape) if tiny else shape, ragged=True)
        for name, shape in QUANTIZED.items()
    ]
    shape = QUANTIZED["2 bits"]
    return [*found, residual(fit(shape) if tiny else shape)]


def fit(shape: kv_quant.QuantizedShape) -> kv_quant.QuantizedShape:
    """The same with few, short sequences."""
    return replace(shape, batch=2, length=200, heads=4, kv_heads=2)


def lengths_of(count: int, longest: int, least: int, ragged: bool) -> list[int]:
    """Of so many sequences; all the longest, or ragged ones of at least `least` tokens."""
    parts = PARTS if ragged else (1.0,)
    return [max(int(parts[i % len(parts)] * longest), least) for i in range(count)]


def table_of(key: Array, lengths: Sequence[int], size: int) -> tuple[Array, int]:
    """`int32[sequences, width]` of pages in random order from 1 on, 0 where none is needed; and how
    many pages there are.
    """
    used = np.asarray([-(-length // size) for length in lengths])
    width = int(used.max())
    mine = np.arange(width) < used[:, None]
    order = jax.random.permutation(key, int(used.sum())).astype(jnp.int32) + 1
    places = np.cumsum(mine.reshape(-1)).reshape(mine.shape) - 1
    return jnp.where(mine, order[np.maximum(places, 0)], 0), int(used.sum()) + 1


def owned(table: Array, lengths: Array, pages: int, size: int) -> Array:
    """`bool[pages, size]`: which slots hold a token of some sequence."""
    slot = jnp.arange(table.shape[1] * size).reshape(1, -1, size)
    mine = slot < lengths[:, None, None]
    return jnp.zeros((pages, size), bool).at[table].max(mine)


def make_step(shape: PagedShape, ragged: bool, key: Array) -> tuple[Any, ...]:
    """q, pages, page table, lengths and first tokens; prompts come first."""
    keys = jax.random.split(key, 3)
    counts = [shape.prompt_tokens] * shape.prompts + [1] * shape.decoding
    lengths = [
        max(length, count)
        for length, count in zip(
            lengths_of(len(counts), shape.length, 1, ragged), counts, strict=True
        )
    ]
    table, pages = table_of(keys[0], lengths, shape.page_size)
    size = (LAYERS, pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim)
    starts = jnp.asarray([0, *np.cumsum(counts)], jnp.int32)
    q = normal(keys[1], shape.tokens, shape.heads, shape.head_dim)
    return q, normal(keys[2], *size), table, jnp.asarray(lengths, jnp.int32), starts


def poison_step(q: Array, pages: Array, table: Array, lengths: Array, *rest: Any) -> Any:
    """NaN in slots of no sequence."""
    mine = owned(table, lengths, *pages.shape[1:3])[None, :, :, None, None]
    return q, jnp.where(mine, pages, jnp.nan), table, lengths, *rest


def ragged_step(name: str, shape: PagedShape, options: dict[str, Any]) -> GpuCase:
    """A step that is checked."""
    kernel, plain = (
        functools.partial(
            paged_attention, layer=LAYER, return_lse=True, implementation=by, **options
        )
        for by in ("gpu", "plain")
    )
    return GpuCase(
        f"paged, {name}",
        functools.partial(make_step, shape, True),
        kernel,
        plain,
        (HALF, LOG_SUM_EXP),
        "gpu" in PAGED_IMPLEMENTATIONS,
        poison=poison_step,
    )


def timed_step(name: str, shape: PagedShape) -> GpuCase:
    """A step whose sequences are all the longest; memory bounds it, even with prompts."""
    longest = shape.prompt_tokens if shape.prompts else 1
    kernel, plain = (
        functools.partial(paged_attention, layer=LAYER, max_query_length=longest, implementation=by)
        for by in ("gpu", "plain")
    )
    q = jax.ShapeDtypeStruct((shape.tokens, shape.heads, shape.head_dim), "bfloat16")
    pages = q.update(shape=(1, shape.page_size, 2 * shape.kv_heads, shape.head_dim))
    own = shape.prompt_tokens * (shape.length - shape.prompt_tokens // 2)
    pairs = shape.decoding * shape.length + shape.prompts * own
    work = paged_cost.paged_attention(
        q, pages, cached_tokens=shape.sequences * shape.length, pairs=pairs
    )
    rivals = (Rival("XLA", plain),)
    if not shape.prompts:
        rivals = (Rival("JAX's Triton kernel", library, split_pages), *rivals)
    return GpuCase(
        f"paged, {name}",
        functools.partial(make_step, shape, False),
        kernel,
        plain,
        HALF,
        "gpu" in PAGED_IMPLEMENTATIONS,
        poison=poison_step,
        speed=Speed(
            *work, "copy", goal=0.80 if name == "llama3_8b_decode" else None, rivals=rivals
        ),
    )


def split_pages(q: Array, pages: Array, table: Array, lengths: Array, _: Array) -> Any:
    """Keys and values `[kv_heads, pages, page_size, dim]` of one layer."""
    by_head = jnp.moveaxis(pages[LAYER], 2, 0)
    return q, by_head[0::2], by_head[1::2], table, lengths


def library(q: Array, k: Array, v: Array, table: Array, lengths: Array) -> Array:
    """`jax.experimental.pallas.ops.gpu.paged_attention`."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    return paged_attention(q * q.shape[-1] ** -0.5, k, v, table, lengths)


def make_prefix(shape: SharedPrefixShape, key: Array) -> tuple[Any, ...]:
    """A decoding step of one group: every row of the table begins with the same pages."""
    keys = jax.random.split(key, 2)
    first, rest = shape.prefix // shape.page_size, -(-shape.suffix // shape.page_size)
    count = 1 + first + shape.members * rest
    common = 1 + jnp.arange(first, dtype=jnp.int32)
    own = 1 + first + jnp.arange(shape.members * rest, dtype=jnp.int32)
    table = jnp.concatenate(
        [jnp.tile(common, (shape.members, 1)), own.reshape(shape.members, rest)], axis=1
    )
    members = jnp.arange(shape.members, dtype=jnp.int32)
    groups = Groups(
        common[None, None],
        jnp.full((1, 1), shape.prefix, jnp.int32),
        jnp.asarray([[0, shape.members]], jnp.int32),
        members[None],
        jnp.full_like(members, shape.prefix),
    )
    q = normal(keys[0], shape.members, shape.heads, shape.head_dim)
    pages = normal(keys[1], LAYERS, count, shape.page_size, 2 * shape.kv_heads, shape.head_dim)
    lengths = shape.prefix + shape.suffix - members % min(shape.suffix, 7)
    starts = jnp.arange(shape.members + 1, dtype=jnp.int32)
    return q, pages, table, lengths.astype(jnp.int32), starts, groups


def prefix(name: str, shape: SharedPrefixShape) -> GpuCase:
    """Beside the same step without the group."""
    options = {"layer": LAYER, "max_query_length": 1}
    grouped = options | {"suffix_width": -(-shape.suffix // shape.page_size)}
    kernel, plain = (
        functools.partial(shared_prefix_attention, implementation=by, **grouped)
        for by in ("gpu", "plain")
    )
    q = jax.ShapeDtypeStruct((shape.members, shape.heads, shape.head_dim), "bfloat16")
    pages = q.update(shape=(1, shape.page_size, 2 * shape.kv_heads, shape.head_dim))
    work = shared_cost.shared_prefix_attention(
        q,
        pages,
        group_tokens=shape.prefix,
        suffix_tokens=shape.members * shape.suffix,
        pairs=shape.members * (shape.prefix + shape.suffix),
    )

    def ungrouped(*arguments: Any) -> Any:
        return paged_attention(*arguments[:-1], implementation="gpu", **options)

    return GpuCase(
        f"shared prefix, {name}",
        functools.partial(make_prefix, shape),
        kernel,
        plain,
        TWICE,
        "gpu" in SHARED_IMPLEMENTATIONS,
        poison=poison_step,
        speed=Speed(*work, "copy", rivals=(Rival("ungrouped", ungrouped), Rival("XLA", plain))),
    )


def make_quantized(shape: kv_quant.QuantizedShape, ragged: bool, key: Array) -> tuple[Any, ...]:
    """q, pages, table and lengths; keys have channels that are larger than others."""
    keys = jax.random.split(key, 5)
    lengths = lengths_of(shape.batch, shape.length, shape.queries, ragged)
    table, count = table_of(keys[0], lengths, shape.page_size)
    size = (count, shape.kv_heads, shape.page_size, shape.head_dim)
    k = normal(keys[1], *size) * (1 + normal(keys[2], shape.head_dim) ** 2)
    v = normal(keys[3], *size)
    empty = empty_pages(shape, count)
    if isinstance(empty, kv_quant.Int8Pages):
        tokens = (jnp.swapaxes(x, 1, 2).reshape(-1, *size[1::2]) for x in (k, v))
        pages = empty.write(LAYER, jnp.arange(count * shape.page_size), *tokens)
    else:
        pages = empty.write(LAYER, jnp.arange(count), k, v)
    q = normal(keys[4], shape.batch, shape.queries, shape.heads, shape.head_dim)
    return q, pages, table, jnp.asarray(lengths, jnp.int32)


def empty_pages(shape: kv_quant.QuantizedShape, count: int) -> kv_quant.QuantizedPages:
    """So many."""
    sizes = (LAYERS, count, shape.kv_heads, shape.page_size, shape.head_dim)
    if shape.bits == 8:
        return kv_quant.Int8Pages.empty(*sizes)
    return kv_quant.KiviPages.empty(*sizes, bits=shape.bits)


def poison_quantized(q: Array, pages: Any, table: Array, lengths: Array, *rest: Any) -> Any:
    """NaN in scales and zeros of tokens of no sequence; groups of keys that hold any are kept."""
    mine = owned(table, lengths, pages.keys.shape[1], pages.page_size)
    if isinstance(pages, kv_quant.Int8Pages):
        names = ("key_scales", "value_scales")
        new = {n: jnp.where(mine[:, None], getattr(pages, n), jnp.nan) for n in names}
    else:
        group = mine.reshape(len(mine), -1, pages.group).any(-1)
        new = {
            "key_grid": jnp.where(group[:, None, None, :, None], pages.key_grid, jnp.nan),
            "value_grid": jnp.where(mine[:, None, None, None], pages.value_grid, jnp.nan),
        }
    return q, replace(pages, **new), table, lengths, *rest


def quantized(name: str, shape: kv_quant.QuantizedShape, ragged: bool = False) -> GpuCase:
    """ragged: sequences of all lengths, checked with the log-sum-exp and not timed."""
    kernel, plain = (
        functools.partial(
            kv_quant.quantized_attention, layer=LAYER, return_lse=ragged, implementation=by
        )
        for by in ("gpu", "plain")
    )
    speed = None
    if not ragged:
        q = jax.ShapeDtypeStruct(
            (shape.batch, shape.queries, shape.heads, shape.head_dim), "bfloat16"
        )
        pages = jax.eval_shape(functools.partial(empty_pages, shape, 1))
        tokens = shape.batch * shape.length
        work = quantized_cost.quantized_attention(q, pages, cached_tokens=tokens)
        speed = Speed(*work, "copy", rivals=(Rival("XLA", plain),))
    return GpuCase(
        f"quantized pages, {name}",
        functools.partial(make_quantized, shape, ragged),
        kernel,
        plain,
        (TWICE, DEQUANTIZED_LOG_SUM_EXP) if ragged else TWICE,
        "gpu" in kv_quant.IMPLEMENTATIONS,
        poison=poison_quantized,
        speed=speed,
    )


def residual(shape: kv_quant.QuantizedShape) -> GpuCase:
    """Two bits with the newest tokens in full, as KIVI decodes."""

    def make(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        size = (LAYERS, shape.batch, shape.kv_heads, 128, shape.head_dim)
        newest = jnp.arange(1, shape.batch + 1, dtype=jnp.int32) * 17
        k, v = normal(keys[1], *size), normal(keys[2], *size)
        return *make_quantized(shape, True, keys[0]), k, v, newest

    def run(implementation: str, *arguments: Any) -> Any:
        return kv_quant.kivi_attention(
            *arguments, layer=LAYER, return_lse=True, implementation=implementation
        )

    return GpuCase(
        "quantized pages, 2 bits and a residual",
        make,
        functools.partial(run, "gpu"),
        functools.partial(run, "plain"),
        (TWICE, DEQUANTIZED_LOG_SUM_EXP),
        "gpu" in kv_quant.IMPLEMENTATIONS,
        poison=poison_quantized,
    )
