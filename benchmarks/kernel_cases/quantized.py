"""Quantized products, 8-bit products, the row quantizer and bit planes, as published models ask for
them; beside XLA's own way, which is to convert the codes and multiply.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_case import Case
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


def cases(generation: str) -> list[Case]:
    """The same for every generation."""
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
    """One product, and XLA's with native 4-bit codes where it has them."""
    s = quantized_matmul.SHAPES[name]
    group = s.group or s.rows
    x, scales = array(s.m, s.rows, dtype=jnp.bfloat16), array(s.rows // group, s.columns)
    words = s.bits < 8
    rows = quantized_matmul.packed_rows(s.rows, s.bits) if words else s.rows
    codes = array(rows, s.columns, dtype=jnp.uint32 if words else jnp.int8)
    made = {"codes": codes, "scales": scales}
    made |= {"zeros": scales} if s.zeros else {}
    made |= {"table": array(2**s.bits)} if s.table else {}

    def run(x: Any, made: Any) -> Any:
        return quantized_matmul.quantized_matmul(x, bits=s.bits, group=group, **made)

    def library(x: Any, codes: Any, scales: Any) -> Any:
        values = codes.astype(jnp.float32).reshape(-1, group, s.columns) * scales[:, None]
        matrix = values.reshape(s.rows, s.columns).astype(x.dtype)
        return jnp.dot(x, matrix, preferred_element_type=jnp.float32).astype(x.dtype)

    native = None if s.table or s.bits not in (4, 8) else jnp.int4 if s.bits == 4 else jnp.int8
    cost = quantized_matmul.cost(s.m, s.rows, s.columns, bits=s.bits, group=group, zeros=s.zeros)
    return Case(
        f"quantized, {name}",
        run,
        (x, made),
        *cost,
        library=None if native is None else library,
        library_shapes=(x, array(s.rows, s.columns, dtype=native or jnp.int8), scales),
    )


def adapters(name: str) -> Case:
    """The gradient of the input, over frozen codes."""
    s = quantized_matmul.SHAPES[name]
    assert s.group is not None
    dy = array(s.m, s.columns, dtype=jnp.bfloat16)
    codes = array(quantized_matmul.packed_rows(s.rows, s.bits), s.columns, dtype=jnp.uint32)
    scales = array(s.rows // s.group, s.columns)

    def run(dy: Any, codes: Any, scales: Any, table: Any) -> Any:
        return quantized_matmul.quantized_matmul(
            dy, codes, scales, bits=s.bits, group=s.group, table=table, transposed=True
        )

    cost = quantized_matmul.cost(s.m, s.rows, s.columns, bits=s.bits, group=s.group)
    return Case(
        f"quantized, {name}, input's gradient", run, (dy, codes, scales, array(2**s.bits)), *cost
    )


def integers(name: str) -> Case:
    """Exact 8-bit products by the kernel; the library is XLA's own."""
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
    return Case(f"int8, {name}", by("tpu"), shapes, *cost, unit="int8", library=by("plain"))


def quantizer(name: str) -> Case:
    """Rows of activations to 8-bit codes; the library is XLA's own."""
    s = int8_matmul.SHAPES[name]
    x = array(s.m, s.rows, dtype=jnp.bfloat16)
    return Case(
        f"quantize_rows, {name}",
        lambda x: int8_matmul.quantize_rows(x)[:2],
        (x,),
        *int8_matmul.quantizer_cost(s.m, s.rows, x.dtype),
        library=lambda x: int8_reference.quantize_rows(x, None)[:2],
    )


def planes(name: str) -> Case:
    """An exact product with codes in planes."""
    s = bit_planes.SHAPES[name]
    stored = array(s.bits, s.rows // 32, s.columns, dtype=jnp.uint32)
    return Case(
        f"bit planes, {name}",
        lambda x, stored: bit_planes.bit_planes_matmul(x, stored, coding="signed"),
        (array(s.m, s.rows, dtype=jnp.int8), stored),
        *bit_planes.cost(s.m, s.rows, s.columns, s.bits),
        unit="int8",
    )
