"""What the public products cost on a CPU: no operation more than the plain function that they are
there, compiled by XLA; a program sees no kernel, no choice and no copy.
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantized_matmul import as_operand, drawn

from kernels_pallas.bit_planes import bit_planes_matmul, pack_planes
from kernels_pallas.bit_planes import blocks as planes_blocks
from kernels_pallas.flat_gemm import flat_gemm
from kernels_pallas.flat_gemm import reference as flat_reference
from kernels_pallas.int8_matmul import blocks as int8_blocks
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.int8_matmul import reference as int8_reference
from kernels_pallas.quantized_matmul import blocks as quantized_blocks
from kernels_pallas.quantized_matmul import quantized_matmul


def floats(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def codes(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(-128, 128, shape), jnp.int8)


def int8(m):
    """From 64 rows on it is XLA's own integer product."""

    def plain(x, w, scales):
        quantized, x_scales, _ = int8_reference.quantize_rows(x, None)
        product = int8_reference.product if m >= 64 else int8_blocks.product
        return int8_reference.scaled(product(quantized, w), x_scales, scales, x.dtype)

    return int8_matmul, plain, (floats(m, 256), codes(256, 128), floats(128))


def quantized(m):
    arguments, _ = drawn(256, 128, 4, 64, zeros=True)

    def plain(x, stored, scales, zeros):
        parts = {**arguments, "codes": stored, "scales": scales, "zeros": zeros}
        return quantized_blocks.matmul(x, as_operand(parts, 256)).astype(x.dtype)

    def ours(x, stored, scales, zeros):
        return quantized_matmul(x, stored, scales, zeros, bits=4, group=64)

    given = (arguments[name] for name in ("codes", "scales", "zeros"))
    return ours, plain, (floats(m, 256), *given)


def planes(m):
    stored = pack_planes(jnp.asarray(np.random.default_rng(0).integers(0, 8, (256, 128))), 3)
    return (
        lambda x, stored: bit_planes_matmul(x, stored, coding="signed"),
        lambda x, stored: planes_blocks.matmul(x, stored, "signed"),
        (codes(m, 256), stored),
    )


def flat(m):
    return flat_gemm, flat_reference.matmul, (floats(m, 256), floats(256, 128))


@pytest.mark.parametrize("m", [2, 64])
@pytest.mark.parametrize("case", [int8, quantized, planes, flat])
def test_a_public_product_is_the_plain_function_and_costs_no_operation_more(case, m):
    ours, plain, arguments = case(m)

    def compiled(function):
        program = jax.jit(lambda *arguments: function(*arguments)).lower(*arguments).compile()
        operations = re.findall(r"= \S+ ([a-z][a-z0-9-]*)\(", program.as_text() or "")
        return collections.Counter(operations), program.cost_analysis()

    (our_operations, our_cost), (operations, cost) = compiled(ours), compiled(plain)
    assert our_operations.total() > 3
    assert our_operations == operations
    assert our_cost == cost
