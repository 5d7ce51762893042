"""Products on a GPU: few bits, 8-bit integers, bit planes, few rows, and groups of rows, beside
cuBLAS with a bfloat16 matrix.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_case import EXACT, HALF, ROUNDED_ONCE, GpuCase, Rival, Speed, normal, whole
from kernels_pallas import bit_planes, flat_gemm, grouped_matmul, int8_matmul, quantized_matmul
from kernels_pallas.quantized_matmul import QuantizedMatmulShape

Array = jax.Array

INT4_GOAL = 0.80
"""Share of the copy bandwidth that decoding with 4-bit weights is to reach."""
INT8_GOAL = 1.5
"""Times the speed of bfloat16 that 8-bit integers are to reach."""
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
)  # fmt: skip
"""QLoRA's 4-bit NormalFloat."""
PACKED: dict[str, QuantizedMatmulShape] = {
    "int4, one row": QuantizedMatmulShape(1, 1024, 512, 4, 128, zeros=True),
    "int4, 128 rows": QuantizedMatmulShape(128, 1024, 264, 4, 128, zeros=True),
    "int4, one scale a column": QuantizedMatmulShape(5, 1024, 512, 4, None),
    "int4, half a tile": QuantizedMatmulShape(7, 992, 512, 4, 32, zeros=True),
    "int8": QuantizedMatmulShape(9, 1024, 512, 8, 128),
    "int3": QuantizedMatmulShape(16, 1024, 512, 3, 64, zeros=True),
    "int2": QuantizedMatmulShape(33, 1024, 512, 2, 64, zeros=True),
    "NF4": QuantizedMatmulShape(16, 1024, 512, 4, 64, table=True),
}
"""Name -> sizes of a call that is checked."""
TIMED = (
    "llama3_8b_up_int4",
    "llama3_8b_down_int4",
    "llama3_8b_query_int4",
    "llama2_7b_down_int4",
    "llama3_8b_up_int8",
    "llama3_8b_up_int3",
    "llama3_8b_up_int2",
    "llama3_8b_up_nf4",
)
FLAT = ("1b_up_1", "1b_up_16", "1b_down_16", "1b_up_128")
GROUPED = ("mixtral_8x7b_decode", "jetmoe_8b")


def cases(tiny: bool) -> list[GpuCase]:
    """tiny: of sizes that a CPU is done with at once."""
    shapes = quantized_matmul.SHAPES
    found = [packed(name, fit(shapes[name]) if tiny else shapes[name], True) for name in TIMED]
    found += [packed(name, fit(shape) if tiny else shape, False) for name, shape in PACKED.items()]
    for name in ("llama3_8b_prefill", "llama3_8b_decode"):
        eight = int8_matmul.SHAPES[name]
        eight = replace(eight, m=8, rows=256, columns=128) if tiny else eight
        found += [integers(name, eight, "gpu"), integers(name, eight, None), rows(name, eight)]
    for name in ("llama_7b_up_w2", "llama_7b_up_w3", "llama_7b_up_w4"):
        shape = bit_planes.SHAPES[name]
        found.append(planes(name, replace(shape, rows=256, columns=128) if tiny else shape))
    found += [flat(name, tiny) for name in FLAT]
    for name in GROUPED:
        shape = grouped_matmul.SHAPES[name]
        small = replace(shape, rows=32, groups=4, d_in=64, d_out=64)
        found += groups(name, small if tiny else shape)
    return found


def fit(shape: QuantizedMatmulShape) -> QuantizedMatmulShape:
    """The same with a small matrix."""
    return replace(shape, m=min(shape.m, 8), rows=512, columns=128)


def make_packed(shape: QuantizedMatmulShape, key: Array) -> tuple[Any, ...]:
    """x and the arguments of the weights: words of codes, scales, and zeros or a table."""
    keys, groups = jax.random.split(key, 4), shape.rows // (shape.group or shape.rows)
    codes = whole(keys[0], 0, 2**shape.bits, shape.rows, shape.columns)
    made = {"codes": quantized_matmul.pack(codes, shape.bits)}
    made["scales"] = jax.random.uniform(keys[1], (groups, shape.columns), minval=0.5, maxval=1.5)
    if shape.zeros:
        middle = 2 ** (shape.bits - 1)
        made["zeros"] = middle + normal(keys[2], groups, shape.columns, dtype=jnp.float32)
    if shape.table:
        made["table"] = jnp.asarray(NF4).astype(jnp.bfloat16).astype(jnp.float32)
    return normal(keys[3], shape.m, shape.rows), made


def poison_packed(shape: QuantizedMatmulShape, x: Array, made: dict[str, Array]) -> Any:
    """Rows beyond the last in a tile have the largest code, not 0."""
    codes, tile = made["codes"], quantized_matmul.tile_rows(shape.bits)
    beyond = jnp.arange(-(-shape.rows // tile) * tile) >= shape.rows
    most = jnp.where(beyond[:, None], 2**shape.bits - 1, 0)
    return x, made | {"codes": codes | quantized_matmul.pack(most, shape.bits)}


def packed(name: str, shape: QuantizedMatmulShape, timed: bool) -> GpuCase:
    """Beside cuBLAS with the same matrix in bfloat16."""
    group = shape.group or shape.rows

    def by(implementation: str) -> Any:
        return lambda x, made: quantized_matmul.quantized_matmul(
            x, bits=shape.bits, group=group, implementation=implementation, **made
        )

    def matrix(x: Array, made: dict[str, Array]) -> tuple[Array, ...]:
        return x, made["scales"][0] * jnp.ones((shape.rows, 1)).astype(x.dtype)

    work = quantized_matmul.cost(
        shape.m, shape.rows, shape.columns, bits=shape.bits, group=group, zeros=shape.zeros
    )
    goal = INT4_GOAL if name in ("llama3_8b_up_int4", "llama3_8b_down_int4") else None
    rivals = (Rival("cuBLAS bf16", jnp.matmul, dense(matrix)), Rival("XLA", by("plain")))
    return GpuCase(
        f"quantized product, {name}",
        functools.partial(make_packed, shape),
        by("gpu"),
        by("plain"),
        HALF,
        "gpu" in quantized_matmul.IMPLEMENTATIONS,
        poison=functools.partial(poison_packed, shape),
        speed=Speed(*work, "copy", goal=goal, rivals=rivals) if timed else None,
    )


def dense(prepare: Any) -> Any:
    """Both factors in bfloat16; what the matrix holds makes no difference to its time."""
    return lambda *arguments: tuple(x.astype(jnp.bfloat16) for x in prepare(*arguments))


def integers(name: str, shape: Any, implementation: str | None) -> GpuCase:
    """By the GPU kernel, or by what the public function chooses; as bound by products or memory."""

    def make(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 4)
        x = whole(keys[0], -127, 128, shape.m, shape.rows, dtype=jnp.int8)
        w = whole(keys[1], -127, 128, shape.rows, shape.columns, dtype=jnp.int8)
        scales = jax.random.uniform(keys[2], (shape.columns,), minval=0.5)
        return x, w, scales, jax.random.uniform(keys[3], (shape.m,), minval=0.5)

    def by(implementation: str | None) -> Any:
        return functools.partial(int8_matmul.int8_matmul, implementation=implementation)

    products = shape.m > 256
    speed = Speed(
        *int8_matmul.cost(shape.m, shape.rows, shape.columns),
        "int8" if products else "copy",
        beside=("cuBLAS bf16", INT8_GOAL) if products else None,
        rivals=(Rival("cuBLAS bf16", jnp.matmul, dense(lambda x, w, *_: (x, w))),)
        + ((Rival("XLA", by("plain")),) if implementation else ()),
    )
    return GpuCase(
        f"int8 product, {name}{'' if implementation else ', as chosen'}",
        make,
        by(implementation),
        by("plain"),
        ROUNDED_ONCE,
        implementation is None or implementation in int8_matmul.IMPLEMENTATIONS,
        speed=speed,
    )


def rows(name: str, shape: Any) -> GpuCase:
    """The quantizer of rows, as the public function chooses; one row is not finite."""

    def make(key: Array) -> tuple[Any, ...]:
        x = normal(key, shape.m, shape.rows)
        return (x.at[shape.m // 2, 3].set(jnp.inf),)

    def run(x: Array, implementation: str | None = None) -> Any:
        return int8_matmul.quantize_rows(x, implementation=implementation)[:2]

    plain = functools.partial(run, implementation="plain")
    work = int8_matmul.quantizer_cost(shape.m, shape.rows, jnp.bfloat16)
    one_code = 1 / 127
    return GpuCase(
        f"quantizer of rows, {name}, as chosen",
        make,
        run,
        plain,
        (one_code, 2.0**-20),  # a quotient that rounds to even or not may be off by one code
        True,
        speed=Speed(*work, "copy", rivals=(Rival("XLA", plain),)),
    )


def planes(name: str, shape: Any) -> GpuCase:
    """Exact, in 32 bits."""

    def make(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key)
        codes = whole(keys[0], 0, 2**shape.bits, shape.rows, shape.columns)
        x = whole(keys[1], -127, 128, shape.m, shape.rows, dtype=jnp.int8)
        return x, bit_planes.pack_planes(codes, shape.bits)

    def by(implementation: str) -> Any:
        return functools.partial(
            bit_planes.bit_planes_matmul, coding="signed", implementation=implementation
        )

    def matrix(x: Array, stored: Array) -> tuple[Array, ...]:
        return x, jnp.ones((shape.rows, 1)) * stored[0, 0]

    work = bit_planes.cost(shape.m, shape.rows, shape.columns, shape.bits)
    rivals = (Rival("cuBLAS bf16", jnp.matmul, dense(matrix)), Rival("XLA", by("plain")))
    return GpuCase(
        f"bit planes, {name}",
        make,
        by("gpu"),
        by("plain"),
        EXACT,
        "gpu" in bit_planes.IMPLEMENTATIONS,
        speed=Speed(*work, "copy", rivals=rivals),
    )


def flat(name: str, tiny: bool) -> GpuCase:
    """By the route that the public function chooses."""
    sizes = flat_gemm.SHAPES[name]
    m, k, n = (min(s, 64) if tiny else s for s in (sizes["m"], sizes["k"], sizes["n"]))

    def make(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key)
        return normal(keys[0], m, k), normal(keys[1], k, n)

    by = functools.partial
    return GpuCase(
        f"flat product, {name}, as chosen",
        make,
        by(flat_gemm.flat_gemm, implementation=None),
        by(flat_gemm.flat_gemm, implementation="library"),
        HALF,
        True,
        speed=Speed(*flat_gemm.cost(m, k, n), "copy", rivals=(Rival("cuBLAS bf16", jnp.matmul),)),
    )


def groups(name: str, shape: Any) -> list[GpuCase]:
    """Rows beyond the last group are NaN. Forward, and the gradient of the matrices."""

    def make(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        x, g = (
            normal(one, shape.rows, width)
            for one, width in ((keys[0], shape.d_in), (keys[1], shape.d_out))
        )
        each = shape.rows // shape.groups
        sizes = jnp.asarray([0, 2 * each, *[each] * (shape.groups - 2)], jnp.int32)
        w = normal(keys[2], shape.groups, shape.d_in, shape.d_out)
        return x, w, sizes.at[-1].add(-each // 2), g

    def poison(x: Array, w: Array, sizes: Array, g: Array) -> tuple[Any, ...]:
        beyond = (jnp.arange(shape.rows) >= jnp.sum(sizes))[:, None]
        return jnp.where(beyond, jnp.nan, x), w, sizes, jnp.where(beyond, jnp.nan, g)

    def multiply(by: str | None, x: Array, w: Array, sizes: Array, g: Array) -> Any:
        return grouped_matmul.grouped_matmul(x, w, sizes, implementation=by)

    def outer(by: str | None, x: Array, w: Array, sizes: Array, g: Array) -> Any:
        return grouped_matmul.grouped_outer(x, g, sizes, implementation=by)

    def tokamax(x: Array, w: Array, sizes: Array, g: Array) -> Any:
        import tokamax as library  # pyright: ignore

        return library.ragged_dot(x, w, sizes)

    flops = 2.0 * shape.rows * shape.d_in * shape.d_out
    few = shape.rows < 1024
    moved = 2.0 * shape.groups * shape.d_in * shape.d_out
    moved += 2.0 * shape.rows * (shape.d_in + shape.d_out)
    common = {"make": make, "tolerance": HALF, "served": True, "poison": poison}
    speed = Speed(flops, moved, "copy" if few else "bfloat16", rivals=(Rival("tokamax", tokamax),))
    by = functools.partial
    return [
        GpuCase(
            f"grouped product, {name}, as chosen",
            kernel=by(multiply, None),
            plain=by(multiply, "plain"),
            speed=speed,
            **common,
        ),
        GpuCase(
            f"grouped gradient, {name}, as chosen",
            kernel=by(outer, None),
            plain=by(outer, "plain"),
            speed=replace(speed, rivals=()),
            **common,
        ),
    ]
