"""What tuning measures of the product with bit planes: a CPU's and a TPU's blocks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kernels_pallas.bit_planes import blocks, reference, tpu
from kernels_pallas.bit_planes.api import bit_planes_matmul
from kernels_pallas.bit_planes.shapes import SHAPES
from kernels_pallas.int8_matmul.tune import scaled_blocks
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

CPU_SHAPES: dict[str, dict[str, int]] = {
    f"w{bits}_{m}": {"m": m, "rows": 1024, "columns": 4096, "bits": bits}
    for bits in (2, 4)
    for m in (1, 16, 256)
}
"""One matrix of a model that a CPU runs, at decoding and at prefill."""
TPU_SHAPES: dict[str, dict[str, int]] = {
    name: {"m": shape.m, "rows": shape.rows, "columns": shape.columns, "bits": shape.bits}
    for name, shape in SHAPES.items()
}


def _cpu_candidates(key: Key) -> list[dict[str, int]]:
    """Up to all columns, and one size beyond."""
    sizes = (256, 512, 1024, 2048, 4096)
    most = 2 * dict(key.sizes)["columns"]
    return [{"columns": columns} for columns in sizes if columns < most]


def _case(implementation: str, key: Key) -> Case:
    """Random codes, exact on all platforms."""
    sizes, rng = dict(key.sizes), np.random.default_rng(0)
    bits = dict(key.options)["bits"]
    x = jnp.asarray(rng.integers(-127, 128, (sizes["m"], sizes["rows"]), dtype=np.int8))
    codes = rng.integers(0, 2**bits, (sizes["rows"], sizes["columns"]), dtype=np.int32)
    return Case(
        lambda x, planes: bit_planes_matmul(
            x, planes, coding="signed", implementation=implementation
        ),
        (x, reference.pack_planes(jnp.asarray(codes), bits)),
        lambda x, planes: reference.matmul(x, planes, "signed"),
        0.0,
    )


BLOCKS = Tunable(
    "cpu",
    CPU_SHAPES,
    lambda sizes, device_kind: [blocks.tuning_key(**sizes, device_kind=device_kind)],
    lambda key: {"columns": blocks.STEP_COLUMNS},
    _cpu_candidates,
    lambda key: _case("plain", key),
)
TPU = Tunable(
    "tpu",
    TPU_SHAPES,
    lambda sizes, device_kind: [tpu.tuning_key(**sizes, device_kind=device_kind)],
    lambda key: dict(tpu.BLOCKS),
    lambda key: scaled_blocks(key, tpu.BLOCKS),
    lambda key: _case("tpu", key),
)
