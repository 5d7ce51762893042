"""What tuning measures of attention: the largest blocks of the two kernels for TPUs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import tpu
from kernels_pallas.attention.api import attention
from kernels_pallas.attention.shapes import SHAPES as CALLS
from kernels_pallas.tpu_topology import GENERATIONS, MIB, generation_of
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

KV_HEADS = 4
"""Key heads of a measured call: enough work for both cores of a chip, and little memory."""
SHAPES: dict[str, dict[str, int]] = {
    name: {
        "queries": shape.queries,
        "keys": shape.keys,
        "window": shape.window or shape.keys,
        "group": shape.heads // shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    for name, shape in CALLS.items()
    if shape.queries > 1
}


def _keys(kernel: str, sizes: Mapping[str, int], device_kind: str) -> list[Key]:
    return [
        tpu.tuning_key(
            kernel,
            queries=sizes["queries"],
            keys=sizes["keys"],
            window=sizes["window"],
            group=sizes["group"],
            head_dim=sizes["head_dim"],
            dtype=jnp.bfloat16,
            device_kind=device_kind,
        )
    ]


def _default(which: int, key: Key) -> dict[str, int]:
    options = dict(key.options)
    generation = generation_of(key.device_kind)
    return tpu.default_blocks(generation, options["group"], options["head_dim"])[which]


def _candidates(which: int, key: Key) -> list[dict[str, int]]:
    """Half, once and twice each default size, no longer than the sequence; and the default with
    fewer or more heads.
    """
    default, sizes, options = _default(which, key), dict(key.sizes), dict(key.options)
    longest = {"queries": sizes["queries"], "keys": sizes["keys"], "keys_at_once": sizes["keys"]}
    choices = {
        name: sorted({min(most, -(-longest[name] // tpu.LANES) * tpu.LANES) for most in scaled})
        if name in longest
        else [size]
        for name, size in default.items()
        for scaled in [(max(size // 2, tpu.LANES), size, 2 * size)]
    }
    made = [
        dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values())
    ]
    if "heads" in default:
        heads = [n for n in (1, 2, 4, 8) if options["group"] % n == 0 and n != default["heads"]]
        made += [{**default, "heads": n} for n in heads]
    return [blocks for blocks in made if _fits(blocks, key)]


def _fits(blocks: Mapping[str, int], key: Key) -> bool:
    generation = generation_of(key.device_kind)
    budget = GENERATIONS[generation].vmem_bytes * 3 // 4 if generation else 16 * MIB
    taken = memory(blocks, dict(key.options)["head_dim"], jnp.dtype(key.dtype).itemsize)
    return blocks.get("keys_at_once", 0) <= blocks["keys"] and taken <= budget


def memory(blocks: Mapping[str, int], head_dim: int, itemsize: int) -> int:
    """Bytes of vector memory that a kernel takes, about: blocks with their double buffers, sums in
    float32, and scores in float32 with their exponentials.
    """
    width = -(-head_dim // tpu.LANES) * tpu.LANES
    heads, at_once = blocks.get("heads", 1), blocks.get("keys_at_once", blocks["keys"])
    rows = heads * blocks["queries"]
    taken = 2 * itemsize * width * (2 * rows + 2 * blocks["keys"])
    taken += 4 * rows * (width + 2 * tpu.LANES) + 3 * 4 * blocks["queries"] * at_once
    return taken + 2 * 2 * 4 * width * blocks.get("keys_resident", 0)


def _case(backward: bool, key: Key) -> Case:
    """Causal attention of one sequence, whose last query is at the last key."""
    sizes, options = dict(key.sizes), dict(key.options)
    queries, keys = sizes["queries"], sizes["keys"]
    seeds = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, queries, KV_HEADS * options["group"], options["head_dim"])]
    shapes += [(1, keys, KV_HEADS, options["head_dim"])] * 2
    q, k, v = (
        jax.random.normal(seed, shape, jnp.dtype(key.dtype))
        for seed, shape in zip(seeds, shapes, strict=True)
    )
    fixed: dict[str, Any] = {"key_positions": np.arange(keys)[None]}
    fixed["query_positions"] = fixed["key_positions"][:, keys - queries :]
    fixed["window"] = sizes["window"] if sizes["window"] < keys else None

    def run(implementation: str, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, implementation=implementation, **fixed)

    def gradients(implementation: str, q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: run(implementation, *arrays), q, k, v)
        return pull(out)

    measured = gradients if backward else run
    return Case(
        lambda q, k, v: measured("tpu", q, k, v),
        (q, k, v),
        lambda q, k, v: measured("chunked", q, k, v),  # the definition's scores may not fit
        5e-2 if backward else 2e-2,
    )


FORWARD = Tunable(
    "tpu",
    SHAPES,
    lambda sizes, device_kind: _keys("tpu_forward", sizes, device_kind),
    lambda key: _default(0, key),
    lambda key: _candidates(0, key),
    lambda key: _case(False, key),
)
BACKWARD = Tunable(
    "tpu",
    SHAPES,
    lambda sizes, device_kind: _keys("tpu_backward", sizes, device_kind),
    lambda key: _default(1, key),
    lambda key: _candidates(1, key),
    lambda key: _case(True, key),
)
