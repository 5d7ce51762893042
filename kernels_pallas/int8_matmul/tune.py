"""What tuning measures of the 8-bit product: a CPU's route, and a TPU's blocks and those of its row
quantizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.int8_matmul import blocks, reference, tpu, tpu_quantizer
from kernels_pallas.int8_matmul.api import int8_matmul, quantize_rows
from kernels_pallas.int8_matmul.shapes import SHAPES
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

CPU_SHAPES: dict[str, dict[str, int]] = {
    f"1024_to_4096_{m}": {"m": m, "rows": 1024, "columns": 4096} for m in (1, 4, 16, 64, 256)
}
"""One matrix of a model that a CPU runs, at decoding and at prefill."""
TPU_SHAPES: dict[str, dict[str, int]] = {
    name: {"m": shape.m, "rows": shape.rows, "columns": shape.columns}
    for name, shape in SHAPES.items()
}
QUANTIZER_SHAPES: dict[str, dict[str, int]] = {
    name: {"m": shape.m, "columns": shape.rows} for name, shape in SHAPES.items()
}
ONE_CODE = 1e-2
"""More than one code of 127: a quotient halfway between two codes may become either."""


def _cpu_candidates(key: Key) -> list[dict[str, int | str]]:
    """Every route, with steps of as many rows as are exact."""
    sizes = dict(key.sizes)
    made: list[dict[str, int | str]] = [{"route": "whole", "rows": 0}]
    made += [{"route": "blocks", "rows": rows} for rows in (64, 128, 256, 512, 1024)]
    made += [{"route": "vector", "rows": rows} for rows in (8, 16, 32)]
    return [one for one in made if blocks.fits(one, sizes["m"], sizes["rows"])]


def scaled_blocks(key: Key, default: Mapping[str, int]) -> list[dict[str, int]]:
    """Half, once and twice each default size of a TPU's product, two of them changed at most; rows
    of input only where there are so many.
    """
    choices: dict[str, tuple[int, ...]] = {
        name: (size // 2, size, 2 * size) for name, size in default.items()
    }
    if dict(key.sizes)["m"] <= default["input_rows"]:
        choices["input_rows"] = (default["input_rows"],)
    made = (
        dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values())
    )
    few = (one for one in made if sum(one[name] != default[name] for name in one) <= 2)
    return [one for one in few if tpu.fits(one)]


def _product_case(implementation: str, key: Key) -> Case:
    """Random codes, and scales near 1."""
    sizes, rng = dict(key.sizes), np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.integers(-127, 128, shape, dtype=np.int8))
        for shape in ((sizes["m"], sizes["rows"]), (sizes["rows"], sizes["columns"]))
    )
    scales, x_scales = (
        jnp.asarray(rng.uniform(0.5, 1.0, size), jnp.float32)
        for size in (sizes["columns"], sizes["m"])
    )

    def plain(x: jax.Array, w: jax.Array, scales: jax.Array, x_scales: jax.Array) -> jax.Array:
        return reference.scaled(reference.product(x, w), x_scales, scales, jnp.float32)

    return Case(
        lambda *arrays: int8_matmul(*arrays, dtype=jnp.float32, implementation=implementation),
        (x, w, scales, x_scales),
        plain,
        1e-6,
    )


def _quantizer_case(key: Key) -> Case:
    sizes, rng = dict(key.sizes), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sizes["m"], sizes["columns"])), jnp.dtype(key.dtype))
    return Case(
        lambda x: quantize_rows(x, implementation="tpu"),
        (x,),
        lambda x: reference.quantize_rows(x, None),
        ONE_CODE,
    )


BLOCKS = Tunable(
    "cpu",
    CPU_SHAPES,
    lambda sizes, device_kind: [blocks.tuning_key(**sizes, device_kind=device_kind)],
    lambda key: blocks.default_sizes(dict(key.sizes)["m"]),
    _cpu_candidates,
    lambda key: _product_case("plain", key),
)
TPU = Tunable(
    "tpu",
    TPU_SHAPES,
    lambda sizes, device_kind: [tpu.tuning_key(**sizes, device_kind=device_kind)],
    lambda key: dict(tpu.BLOCKS),
    lambda key: scaled_blocks(key, tpu.BLOCKS),
    lambda key: _product_case("tpu", key),
)
QUANTIZER = Tunable(
    "tpu",
    QUANTIZER_SHAPES,
    lambda sizes, device_kind: [
        tpu_quantizer.tuning_key(**sizes, dtype=jnp.bfloat16, device_kind=device_kind)
    ],
    lambda key: tpu_quantizer.default_blocks(dict(key.sizes)["columns"]),
    lambda key: [{"input_rows": rows} for rows in (32, 64, 128, 256, 512)],
    _quantizer_case,
)
