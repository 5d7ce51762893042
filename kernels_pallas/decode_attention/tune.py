"""What tuning measures of decode attention on TPUs: the bytes of a block of keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import reference, tpu
from kernels_pallas.decode_attention.api import decode_attention
from kernels_pallas.decode_attention.shapes import SHAPES as CALLS
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

SHAPES: dict[str, dict[str, int]] = {
    name: {
        "batch": shape.batch,
        "queries": shape.queries,
        "slots": shape.slots,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "dims": 2 * shape.head_dim,
    }
    for name, shape in CALLS.items()
    if shape.window is None  # a window reads a few blocks; its sizes are those of short caches
}


def _keys(sizes: Mapping[str, int], device_kind: str) -> list[Key]:
    return [tpu.tuning_key(**sizes, dtype=jnp.bfloat16, device_kind=device_kind)]


def _default(key: Key) -> dict[str, int]:
    return {"block_bytes": tpu.BLOCK_BYTES}


def _candidates(key: Key) -> list[dict[str, int]]:
    """From a quarter to four times the default, where that cuts the slots."""
    slots, options = dict(key.sizes)["slots"], dict(key.options)
    budgets = [tpu.BLOCK_BYTES * times // 4 for times in (1, 2, 4, 8, 16)]
    call = (slots, options["kv_heads"], options["dims"], jnp.dtype(key.dtype))
    made = {tpu.block_of(*call, budget): budget for budget in reversed(budgets)}
    return [{"block_bytes": budget} for keys, budget in made.items() if keys is not None]


def _case(key: Key) -> Case:
    """One query of each head, and full caches."""
    sizes, options = dict(key.sizes), dict(key.options)
    kv_heads, dim = options["kv_heads"], options["dims"] // 2
    shapes = [(sizes["batch"], 1, sizes["rows"] * kv_heads, dim)]
    shapes += [(1, sizes["batch"], kv_heads, sizes["slots"], dim)] * 2
    q, k, v = (
        jax.random.normal(seed, shape, jnp.dtype(key.dtype))
        for seed, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    )
    lengths = jnp.full(sizes["batch"], sizes["slots"], jnp.int32)
    return Case(
        lambda *arrays: decode_attention(*arrays, layer=0, implementation="tpu"),
        (q, k, v, lengths),
        lambda *arrays: reference.decode_attention(*arrays, layer=0),
        2e-2,
    )


TPU = Tunable("tpu", SHAPES, _keys, _default, _candidates, _case)
