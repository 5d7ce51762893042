"""Decode attention to quantized pages on a GPU.

Pallas' Mosaic back end has no register layout in which a word of packed codes becomes as many rows;
each thread's would have to be placed by instruction. So this goes through its Triton back end,
which lowers in every supported version of JAX although it is deprecated.

A program takes one kv head of one sequence and a part of its pages. It reads the codes of a page
into registers, makes floats of them there, and multiplies; the compiler copies the next page
meanwhile. The parts are merged afterwards. By the assembler's count of registers a processor holds
two programs for 8 bits and one for fewer, which is what the number of parts is chosen for. By
estimate, making the floats of a page takes about as long as reading it in 8 bits, so that pages of
fewer bits save memory rather than time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.attention.reference import merge
from kernels_pallas.decode_attention.copies_gpu import KEYS
from kernels_pallas.decode_attention.gpu import splits_for
from kernels_pallas.decode_attention.softmax import Softmax, Unified
from kernels_pallas.decode_attention.stream import Masking
from kernels_pallas.decode_attention.work import masking_of, per_row, stack_rows, unstack_rows
from kernels_pallas.kv_quant.pages import Int8Pages, QuantizedPages
from kernels_pallas.kv_quant.tpu import arrays_of
from kernels_pallas.target import Target

Array = jax.Array
LOWEST = -1e30
"""Where a running maximum starts, and a hidden score; finite, so that nothing gives no NaN."""
MOST_ROWS = 64


@dataclass(frozen=True)
class Call:
    """Static. bits: of a code; 8 are those of `Int8Pages`. group: that share a scale."""

    masking: Masking
    bits: int
    group: int
    page_size: int
    dim: int
    dtype: Any


class References(NamedTuple):
    """What the kernel is given; blocks of this program, or whole arrays."""

    lengths: Any
    first: Any
    table: Any
    layer: Any
    q: Any
    slopes: Any
    phi: Any
    arrays: Sequence[Any]
    out: Any
    lse: Any


class State(NamedTuple):
    """Of each row: weighted values, constant or running maximum, sum of exponentials."""

    values: Array
    peak: Array
    total: Array


def quantized_attention(
    q: Array,
    pages: QuantizedPages,
    page_table: Array,
    lengths: Array,
    *,
    positions: Array | None = None,
    layer: Any = 0,
    alibi_slopes: Array | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
    target: Target | None = None,
    splits: int | None = None,
    interpret: bool = False,
    **options: Any,
) -> Any:
    """See `reference.quantized_attention`. splits: parts of each sequence's pages; None chooses."""
    _, queries, heads, dim = q.shape
    kv_heads = pages.keys.shape[2]
    group = heads // kv_heads
    rows = max(16, pl.next_power_of_2(queries * group))
    masking = masking_of(
        queries,
        group,
        rows,
        head_dim=dim,
        softmax=softmax,
        alibi_slopes=alibi_slopes,
        splits=splits or parts_for(pages, page_table, target),
        **options,
    )
    first = lengths - queries if positions is None else positions
    numbers = (lengths, first, page_table, jnp.asarray(layer, jnp.int32).reshape(1))
    phi = softmax.phi if isinstance(softmax, Unified) else None
    extra = [per_row(x, queries, kv_heads, rows) for x in (alibi_slopes, phi) if x is not None]
    bits, shared = (8, 1) if isinstance(pages, Int8Pages) else (pages.bits, pages.group)
    call = Call(masking, bits, shared, pages.page_size, dim, q.dtype)
    found = _run(call, kv_heads, numbers, stack_rows(q, kv_heads, rows), extra, pages, interpret)
    out, lse = merge(*(list(jnp.moveaxis(x, 2, 0)) for x in found))
    out, lse = (unstack_rows(x, queries, group) for x in (out.astype(q.dtype), lse))
    return (out, lse) if return_lse else out


def parts_for(pages: QuantizedPages, page_table: Array, target: Target | None) -> int:
    """Of each sequence's pages, so that the programs fill the device."""
    (batch, width), at_once = page_table.shape, 2 if isinstance(pages, Int8Pages) else 1
    programs = max(1, batch * pages.keys.shape[2] // at_once)
    return splits_for(target, programs, -(-width * pages.page_size // KEYS))


def _run(
    call: Call,
    kv_heads: int,
    numbers: Sequence[Array],
    q: Array,
    extra: Sequence[Any],
    pages: QuantizedPages,
    interpret: bool,
) -> Sequence[Array]:
    """`float32[batch, kv_heads, splits, rows, dim]`, and the log-sum-exp."""
    masking, anywhere = call.masking, pl.BlockSpec(memory_space=pl.ANY)
    lead = (len(q), kv_heads, masking.splits, masking.rows)
    tile = pl.BlockSpec((None, None, masking.rows, call.dim), lambda b, h, part: (b, h, 0, 0))
    of_head = pl.BlockSpec((None, masking.rows), lambda b, h, part: (h, 0))
    result = (None, None, None, masking.rows)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid=lead[:3],
        in_specs=[anywhere] * 4 + [tile] + [of_head] * len(extra) + [anywhere] * 4,
        out_specs=[
            pl.BlockSpec((*result, call.dim), lambda b, h, part: (b, h, part, 0, 0)),
            pl.BlockSpec(result, lambda b, h, part: (b, h, part, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, call.dim), jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="quantized_attention",
    )(*numbers, q, *extra, *arrays_of(pages))


def _kernel(call: Call, *refs: Any) -> None:
    masking = call.masking
    numbers, optional, arrays, results = refs[:5], list(refs[5:-6]), refs[-6:-2], refs[-2:]
    slopes = optional.pop(0) if masking.alibi else None
    phi = optional.pop(0) if masking.unified is not None else None
    r = References(*numbers, slopes, phi, arrays, *results)  # pyright: ignore[reportCallIssue]
    b, head, part = (pl.program_id(axis) for axis in range(3))
    length = r.lengths[b]
    count = (length + call.page_size - 1) // call.page_size
    share = (count + masking.splits - 1) // masking.splits
    start, stop = part * share, jnp.minimum((part + 1) * share, count)
    q = r.q[...]
    attend = functools.partial(_attend, call, r, q, b, head, length)
    zero = jnp.zeros(masking.rows, jnp.float32)
    empty = State(jnp.zeros((masking.rows, call.dim), jnp.float32), zero + LOWEST, zero)
    if phi is None:
        state = jax.lax.fori_loop(start, stop, functools.partial(attend, online=True), empty)
    else:
        constant = empty._replace(peak=phi[...])
        state = jax.lax.fori_loop(start, stop, functools.partial(attend, online=False), constant)
        state = _fall_back(call, r, b, attend, start, stop, empty, state)
    seen = ~(state.total <= 0)  # a NaN is seen, and stays one
    safe = jnp.where(seen, state.total, 1.0)
    r.out[...] = state.values / safe[:, None]
    r.lse[...] = jnp.where(seen, state.peak + jnp.log(safe), -jnp.inf)


def _positions(call: Call, r: References, b: Any) -> tuple[Array, Array]:
    """Of each row's token, and whether the row has one."""
    row = jnp.arange(call.masking.rows, dtype=jnp.int32)
    return r.first[b] + row // call.masking.group, row < call.masking.tokens * call.masking.group


def _attend(
    call: Call, r: References, q: Array, b: Any, head: Any, length: Any, page: Any, state: State,
    *, online: bool,
) -> State:  # fmt: skip
    """Add one page of keys to the state of every row."""
    masking = call.masking
    at = (r.layer[0], r.table[b, page], head)
    scores = _scores(call, r, q, at) * masking.scale
    slot = page * call.page_size + jnp.arange(call.page_size, dtype=jnp.int32)
    position, real = _positions(call, r, b)
    distance = position[:, None] - slot[None, :]
    if r.slopes is not None:
        scores = scores - r.slopes[...][:, None] * distance.astype(jnp.float32)
    if masking.soft_cap is not None:
        scores = masking.soft_cap * jnp.tanh(scores / masking.soft_cap)
    visible = (distance >= 0) & (slot < length)[None, :] & real[:, None]
    scores = jnp.where(visible, scores, LOWEST)
    values, peak, total = state
    if online:
        now = jnp.maximum(peak, jnp.max(scores, axis=1))
        keep = jnp.exp(peak - now)
        values, total, peak = values * keep[:, None], total * keep, now
    weights = jnp.where(visible, jnp.exp(scores - peak[:, None]), 0.0)
    values = values + _values(call, r, weights, at, slot < length)
    return State(values, peak, total + jnp.sum(weights, axis=1))


def _fall_back(
    call: Call, r: References, b: Any, attend: Any, start: Any, stop: Any, empty: State,
    state: State,
) -> State:  # fmt: skip
    """Once more with the running maximum if a row left the range; only the rows that did take what
    comes of it.
    """
    assert call.masking.unified is not None
    low, high = (math.exp(bound) for bound in call.masking.unified)
    position, real = _positions(call, r, b)
    good = (state.total >= low) & (state.total <= high)  # false for NaN
    fallen = ~good & real & (position >= 0)
    stop = jnp.where(jnp.max(fallen.astype(jnp.int32)) > 0, stop, start)
    again = jax.lax.fori_loop(start, stop, functools.partial(attend, online=True), empty)
    return State(
        jnp.where(fallen[:, None], again.values, state.values),
        jnp.where(fallen, again.peak, state.peak),
        jnp.where(fallen, again.total, state.total),
    )


def _scores(call: Call, r: References, q: Array, at: tuple[Any, ...]) -> Array:
    """`[rows, page_size]`, not scaled."""
    keys, scales = r.arrays[:2]
    if call.bits == 8:
        codes = keys[(*at, slice(None), slice(None))].astype(call.dtype)
        return _dot(q, codes.T) * scales[(*at, slice(None))][None, :]
    scale, zero = _grid(scales, at)
    codes = _codes(call, keys, at).reshape(-1, call.group, call.dim)
    k = (codes * scale[:, None, :] + zero[:, None, :]).reshape(call.page_size, call.dim)
    return _dot(q, k.astype(call.dtype).T)


def _values(call: Call, r: References, weights: Array, at: tuple[Any, ...], valid: Array) -> Array:
    """`[rows, dim]` of weights `[rows, page_size]`."""
    values, scales = r.arrays[2:]
    if call.bits == 8:
        scale = jnp.where(valid, scales[(*at, slice(None))], 0.0)
        codes = values[(*at, slice(None), slice(None))].astype(call.dtype)
        return _dot((weights * scale[None, :]).astype(call.dtype), codes)
    scale, zero = (jnp.where(valid[:, None], x.T, 0.0) for x in _grid(scales, at))
    codes = _codes(call, values, at).reshape(call.page_size, -1, call.group)
    v = (codes * scale[:, :, None] + zero[:, :, None]).reshape(call.page_size, call.dim)
    return _dot(weights.astype(call.dtype), v.astype(call.dtype))


def _grid(grid: Any, at: tuple[Any, ...]) -> tuple[Array, Array]:
    scale, zero = (grid[(*at, i, slice(None), slice(None))].astype(jnp.float32) for i in (0, 1))
    return scale, zero


def _codes(call: Call, words: Any, at: tuple[Any, ...]) -> Array:
    """float32 `[page_size, dim]`; the stretches of a word in their order."""
    packed = words[(*at, slice(None), slice(None))]
    shifts = call.bits * jnp.arange(32 // call.bits, dtype=jnp.int32)
    codes = (packed[None, :, :] >> shifts[:, None, None]) & (2**call.bits - 1)
    return codes.reshape(call.page_size, call.dim).astype(jnp.float32)


def _dot(a: Array, b: Array) -> Array:
    exact = None if a.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    q, pages = arguments["q"], arguments["pages"]
    rows = q.shape[1] * q.shape[2] // pages.keys.shape[2]
    for name, size in (("page_size", pages.page_size), ("head_dim", q.shape[-1])):
        if size not in (32, 64, 128):
            return f"{name} {size}; the GPU kernel takes 32, 64 or 128"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"queries are {q.dtype}; the GPU kernel takes floats of 16 or 32 bits"
    if rows > MOST_ROWS:
        return f"{rows} rows of queries for one kv head; the GPU kernel takes {MOST_ROWS}"
    return None
