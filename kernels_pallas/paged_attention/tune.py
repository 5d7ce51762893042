"""What tuning measures of paged attention on TPUs: how many pages are read at a time, and the rows
of a tile of a prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.paged_attention import reference, tpu
from kernels_pallas.paged_attention.api import paged_attention
from kernels_pallas.paged_attention.shapes import SHAPES as CALLS
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

SHAPES: dict[str, dict[str, int]] = {
    name: {
        "tokens": shape.tokens,
        "sequences": shape.sequences,
        "length": shape.length,
        "page_size": shape.page_size,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    for name, shape in CALLS.items()
}


def _keys(sizes: Mapping[str, int], device_kind: str) -> list[Key]:
    prompts = sizes["tokens"] > sizes["sequences"]
    call = {"prompts": prompts, "dtype": jnp.bfloat16, "device_kind": device_kind}
    return [tpu.tuning_key(**sizes, **call)]  # pyright: ignore[reportArgumentType]


def _default(key: Key) -> dict[str, int]:
    return dict(tpu.DEFAULT_SIZES)


def _candidates(key: Key) -> list[dict[str, int]]:
    """Half, once, twice and four times the default buffer, in bytes and tokens together; for
    prompts, half and twice the rows of a tile.
    """
    default = _default(key)
    tiles = (0.5, 1, 2) if dict(key.options)["prompts"] else (1,)
    return [
        {
            "block_bytes": int(default["block_bytes"] * buffer),
            "block_tokens": int(default["block_tokens"] * buffer),
            "tile_rows": int(default["tile_rows"] * tile),
        }
        for buffer, tile in itertools.product((0.5, 1, 2, 4), tiles)
    ]


def _case(key: Key) -> Case:
    """Full page tables; the tokens that are more than the sequences are one sequence's prompt."""
    sizes, options = dict(key.sizes), dict(key.options)
    kv_heads, dim, size = (options[name] for name in ("kv_heads", "head_dim", "page_size"))
    sequences, width = sizes["sequences"], -(-sizes["length"] // size)
    shapes = (
        (sizes["tokens"], kv_heads * options["group"], dim),
        (1, sequences * width, size, 2 * kv_heads, dim),
    )
    q, pages = (
        jax.random.normal(seed, shape, jnp.dtype(key.dtype))
        for seed, shape in zip(jax.random.split(jax.random.key(0)), shapes, strict=True)
    )
    table = np.random.default_rng(0).permutation(sequences * width).reshape(sequences, width)
    lengths, longest = np.full(sequences, sizes["length"]), sizes["tokens"] - sequences + 1
    starts = np.append(np.arange(sequences), sizes["tokens"])
    return Case(
        lambda *arrays: paged_attention(
            *arrays, layer=0, max_query_length=longest, implementation="tpu"
        ),
        (q, pages, *(jnp.asarray(x, jnp.int32) for x in (table, lengths, starts))),
        lambda *arrays: reference.paged_attention(*arrays, layer=0, max_query_length=longest),
        2e-2,
    )


TPU = Tunable("tpu", SHAPES, _keys, _default, _candidates, _case)
