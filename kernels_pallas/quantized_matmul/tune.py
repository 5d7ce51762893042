"""What tuning measures of the quantized product: a CPU's route and steps, a TPU's blocks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul import blocks, reference, tpu_plan
from kernels_pallas.quantized_matmul.api import quantized_matmul
from kernels_pallas.quantized_matmul.operand import Operand
from kernels_pallas.quantized_matmul.packing import packed_rows
from kernels_pallas.quantized_matmul.shapes import SHAPES as CALLS
from kernels_pallas.quantized_matmul.sizes import tuning_key
from kernels_pallas.tpu_topology import generation_of
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

TPU_SHAPES: dict[str, dict[str, int]] = {
    name: {
        "m": shape.m,
        "rows": shape.rows,
        "columns": shape.columns,
        "bits": shape.bits,
        "group": shape.group or 0,
        "table": int(shape.table),
    }
    for name, shape in CALLS.items()
    if shape.group is not None  # XLA multiplies by the others
}
CPU_SHAPES: dict[str, dict[str, int]] = {
    f"{name}_{m}": {"m": m, "rows": 1024, "columns": 4096, **stored}
    for m in (1, 4, 16, 64, 256)
    for name, stored in {
        "int8": {"bits": 8, "group": 0, "table": 0},
        "int4": {"bits": 4, "group": 128, "table": 0},
        "int2": {"bits": 2, "group": 64, "table": 0},
        "nf4": {"bits": 4, "group": 64, "table": 1},
    }.items()
}
"""One matrix of a model that a CPU runs, in four formats, at decoding and at prefill."""


def _shaped(sizes: Mapping[str, int]) -> Operand:
    """The operand of a shape; without arrays."""
    rows, columns, bits = (sizes[name] for name in ("rows", "columns", "bits"))
    words = bits < 8
    codes = (packed_rows(rows, bits), columns) if words else (rows, columns)
    scales = jax.ShapeDtypeStruct((rows // (sizes["group"] or rows), columns), jnp.float32)
    table = jax.ShapeDtypeStruct((2**bits,), jnp.float32) if sizes["table"] else None
    return Operand(
        codes=jax.ShapeDtypeStruct(codes, jnp.uint32 if words else jnp.int8),  # pyright: ignore
        scales=scales,  # pyright: ignore[reportArgumentType]
        zeros=scales if words and not table else None,  # pyright: ignore[reportArgumentType]
        offsets=None,
        table=table,  # pyright: ignore[reportArgumentType]
        select=None,
        rows=rows,
        bits=bits,
        group=sizes["group"] or rows,
    )


def _of(key: Key) -> tuple[int, Operand]:
    """Rows of input and operand of a key."""
    options, sizes = dict(key.options), dict(key.sizes)
    table = options["stored"].endswith("table")
    sizes |= {"bits": options["bits"], "group": options["group"], "table": int(table)}
    return sizes["m"], _shaped(sizes)


def _cpu_candidates(key: Key) -> list[dict[str, Any]]:
    """Every route, and blocks of half to four times the default steps."""
    m, w = _of(key)
    default = blocks.default_sizes(m, w)
    steps = itertools.product((128, 256, 512, 1024), (256, 1024, 4096))
    made = [{**default, "route": "blocks", "rows": r, "columns": c} for r, c in steps]
    made += [{**default, "route": route} for route in ("vector", "whole")]
    return [sizes for sizes in made if blocks.fits(sizes, m, w)]


def _tpu_default(key: Key) -> dict[str, int]:
    generation = generation_of(key.device_kind) or "v5e"  # elsewhere it runs interpreted only
    return tpu_plan.default_blocks(*_of(key), generation)


def _tpu_candidates(key: Key) -> list[dict[str, int]]:
    """Half, once and twice each default size; rows of input only where there are so many."""
    (m, w), default = _of(key), _tpu_default(key)
    scaled: dict[str, tuple[int, ...]] = {
        name: (size // 2, size, 2 * size) for name, size in default.items()
    }
    if m <= default["input_rows"]:
        scaled["input_rows"] = (default["input_rows"],)
    made = (dict(zip(scaled, sizes, strict=True)) for sizes in itertools.product(*scaled.values()))
    few = (sizes for sizes in made if sum(sizes[name] != default[name] for name in sizes) <= 2)
    return [sizes for sizes in few if tpu_plan.fits(sizes, w)]


def _case(implementation: str, key: Key) -> Case:
    """A product with random codes."""
    (m, w), rng = _of(key), np.random.default_rng(0)
    dtype, transposed = jnp.dtype(key.dtype), dict(key.options).get("transposed", False)

    def draw(shaped: Any) -> jax.Array:
        if jnp.issubdtype(shaped.dtype, jnp.integer):
            limits = jnp.iinfo(shaped.dtype)
            return jnp.asarray(
                rng.integers(limits.min, limits.max, shaped.shape, dtype=shaped.dtype)
            )
        return jnp.asarray(rng.uniform(0.5, 1.0, shaped.shape), shaped.dtype)

    def run(x: jax.Array, w: Operand) -> jax.Array:
        return quantized_matmul(
            x, w.codes, w.scales, w.zeros, bits=w.bits, group=w.group, table=w.table,
            transposed=transposed, rows=w.rows, dtype=jnp.float32, implementation=implementation,
        )  # fmt: skip

    plain = reference.matmul_transposed if transposed else reference.matmul
    x = jnp.asarray(rng.normal(size=(m, w.columns if transposed else w.rows)), dtype)
    tolerance = 1e-4 if implementation == "plain" else 2e-2
    return Case(run, (x, jax.tree.map(draw, w)), plain, tolerance)


BLOCKS = Tunable(
    "cpu",
    CPU_SHAPES,
    lambda sizes, device_kind: [
        tuning_key("blocks", sizes["m"], _shaped(sizes), jnp.float32, device_kind)
    ],
    lambda key: blocks.default_sizes(*_of(key)),
    _cpu_candidates,
    lambda key: _case("plain", key),
)
TPU = Tunable(
    "tpu",
    TPU_SHAPES,
    lambda sizes, device_kind: [
        tuning_key(
            "tpu", sizes["m"], _shaped(sizes), jnp.bfloat16, device_kind, transposed=transposed
        )
        for transposed in ((False, True) if sizes["m"] > 256 else (False,))
    ],
    _tpu_default,
    _tpu_candidates,
    lambda key: _case("tpu", key),
)
