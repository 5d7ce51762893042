"""Quantized products, 8-bit products, the row quantizer and bit planes, as published models ask for
them; beside XLA's own way, which is to convert the codes and multiply.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_case import Case, Rival
from kernels_pallas import bit_planes, int8_matmul, quantized_matmul
from kernels_pallas.int8_matmul import reference as int8_reference

SHAPES = (
    "llama3_8b_query_int4",
    "llama3_8b_up_int4",
    "llama3_8b_down_int4",
    "llama3_8b_up_int3",
    "llama3_8b_up_int2",
    "llama3_8b_up_int8",
    "llama3_8b_up_nf4",
    "llama3_8b_up_int4_prefill",
)


def cases() -> list[Case]:
    """Each with XLA's own way."""
    return [
        *(packed(name) for name in SHAPES),
        adapters("qlora_7b_nf4"),
        integers("llama3_8b_decode"),
        integers("llama3_8b_prefill"),
        quantizer("llama3_8b_prefill"),
        planes("llama_7b_up_w2"),
        planes("llama_7b_up_w4"),
    ]


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(name: str) -> Case:
    """One product, and XLA's: of native codes where it has the type, else of the same words."""
    s = quantized_matmul.SHAPES[name]
    group = s.group or s.rows
    x, scales = array(s.m, s.rows, dtype=jnp.bfloat16), array(s.rows // group, s.columns)
    made = {"codes": stored(s), "scales": scales}
    made |= {"zeros": scales} if s.zeros else {}
    made |= {"table": array(2**s.bits)} if s.table else {}

    def by(implementation: str | None) -> Any:
        options = {"bits": s.bits, "group": group, "implementation": implementation}
        return lambda x, made: quantized_matmul.quantized_matmul(x, **made, **options)

    native = None if s.table else {4: jnp.int4, 8: jnp.int8}.get(s.bits)
    xla = Rival("XLA, words", by("plain"))
    if native is not None:
        made_native = made | {"codes": array(s.rows, s.columns, dtype=native)}
        xla = Rival(f"XLA, int{s.bits}", by("plain"), (x, made_native))
    cost = quantized_matmul.cost(s.m, s.rows, s.columns, bits=s.bits, group=group, zeros=s.zeros)
    return Case(f"quantized, {name}", by(None), (x, made), *cost, xla=xla)


def stored(s: Any) -> jax.ShapeDtypeStruct:
    """Words of codes, or bytes."""
    if s.bits == 8:
        return array(s.rows, s.columns, dtype=jnp.int8)
    return array(quantized_matmul.packed_rows(s.rows, s.bits), s.columns, dtype=jnp.uint32)


def adapters(name: str) -> Case:
    """The gradient of the input, over frozen codes."""
    s = quantized_matmul.SHAPES[name]
    assert s.group is not None
    dy, scales = array(s.m, s.columns, dtype=jnp.bfloat16), array(s.rows // s.group, s.columns)

    def by(implementation: str | None) -> Any:
        options = {"bits": s.bits, "group": s.group, "implementation": implementation}
        return lambda dy, codes, scales, table: quantized_matmul.quantized_matmul(
            dy, codes, scales, table=table, transposed=True, **options
        )

    return Case(
        f"quantized, {name}, input's gradient",
        by(None),
        (dy, stored(s), scales, array(2**s.bits)),
        *quantized_matmul.cost(s.m, s.rows, s.columns, bits=s.bits, group=s.group),
        xla=Rival("XLA, words", by("plain")),
    )


def integers(name: str) -> Case:
    """Exact 8-bit products by the kernel."""
    s = int8_matmul.SHAPES[name]
    shapes = (
        array(s.m, s.rows, dtype=jnp.int8),
        array(s.rows, s.columns, dtype=jnp.int8),
        array(s.columns),
        array(s.m),
    )

    def by(implementation: str) -> Any:
        return lambda *arrays: int8_matmul.int8_matmul(*arrays, implementation=implementation)

    cost = int8_matmul.cost(s.m, s.rows, s.columns)
    xla = Rival("XLA, int8", by("plain"))
    return Case(f"int8, {name}", by("tpu"), shapes, *cost, unit="int8", xla=xla)


def quantizer(name: str) -> Case:
    """Rows of activations to 8-bit codes."""
    s = int8_matmul.SHAPES[name]
    x = array(s.m, s.rows, dtype=jnp.bfloat16)
    return Case(
        f"quantize_rows, {name}",
        lambda x: int8_matmul.quantize_rows(x)[:2],
        (x,),
        *int8_matmul.quantizer_cost(s.m, s.rows, x.dtype),
        xla=Rival("XLA", lambda x: int8_reference.quantize_rows(x, None)[:2]),
    )


def planes(name: str) -> Case:
    """An exact product with codes in planes; XLA puts them together and multiplies."""
    s = bit_planes.SHAPES[name]
    planes = array(s.bits, s.rows // 32, s.columns, dtype=jnp.uint32)

    def together(x: jax.Array, planes: jax.Array) -> jax.Array:
        half = 2 ** (s.bits - 1)
        codes = (bit_planes.unpack_planes(planes) ^ half) - half
        return jnp.dot(x, codes.astype(jnp.int8), preferred_element_type=jnp.int32)

    return Case(
        f"bit planes, {name}",
        lambda x, planes: bit_planes.bit_planes_matmul(x, planes, coding="signed"),
        (array(s.m, s.rows, dtype=jnp.int8), planes),
        *bit_planes.cost(s.m, s.rows, s.columns, s.bits),
        unit="int8",
        xla=Rival("XLA, words", together),
    )
