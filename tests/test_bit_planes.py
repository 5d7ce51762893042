"""Products with bit planes against 64-bit integers, for every width and coding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpu_aot import compile_and_fit, on_every_generation

from kernels_pallas.bit_planes import (
    CODINGS,
    binary_coded_matmul,
    bit_planes_matmul,
    cost,
    pack_planes,
    reference,
    tpu,
    unpack_planes,
)


def drawn(rows, columns, bits, coding, seed=0):
    """Planes, and the integers that they stand for."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns))
    meaning = {
        "binary": codes,
        "signed": codes - 2**bits * (codes >> (bits - 1)),
        "bipolar": 2 * codes - (2**bits - 1),
    }
    return pack_planes(jnp.asarray(codes), bits), meaning[coding]


def whole(shape, low, high, dtype, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(low, high + 1, shape), dtype)


@settings(max_examples=10, deadline=None)
@given(
    m=st.sampled_from([0, 1, 5]),
    rows=st.sampled_from([1, 256, 300, 520]),
    columns=st.sampled_from([1, 40]),
    bits=st.integers(1, 8),
    coding=st.sampled_from(CODINGS),
    kind=st.sampled_from([(-128, 127, jnp.int8), (0, 255, jnp.uint8), (-255, 255, jnp.int16)]),
)
def test_the_product_is_that_of_the_integers(m, rows, columns, bits, coding, kind):
    planes, values = drawn(rows, columns, bits, coding)
    x = whole((m, rows), *kind)
    expected = np.asarray(x, np.int64) @ values
    np.testing.assert_array_equal(bit_planes_matmul(x, planes, coding=coding), expected)
    plain = bit_planes_matmul(x, planes, coding=coding, implementation="plain")
    np.testing.assert_array_equal(plain, expected)
    np.testing.assert_array_equal(reference.matmul(x, planes, coding), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_come_back_and_take_their_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (512, 3))
    planes = pack_planes(jnp.asarray(codes), bits)
    assert planes.size * 32 == codes.size * bits
    np.testing.assert_array_equal(unpack_planes(planes, 512), codes)


@pytest.mark.parametrize(("bits", "x_bits"), [(1, 1), (2, 8), (3, 5), (8, 8)])
def test_bipolar_products_are_those_of_exclusive_or_and_bit_count(bits, x_bits):
    rows = 300
    planes, values = drawn(rows, 6, bits, "bipolar")
    x_planes, x_values = drawn(rows, 4, x_bits, "bipolar", seed=1)
    expected = x_values.T @ values
    counted = reference.popcount_product(x_planes, planes, rows)
    np.testing.assert_array_equal(counted, expected)
    x = jnp.asarray(x_values.T, jnp.int16)
    np.testing.assert_array_equal(bit_planes_matmul(x, planes, coding="bipolar"), expected)


KERNELS = [
    *((bits, coding, "v5e") for bits, coding in ((1, "bipolar"), (3, "signed"), (7, "binary"))),
    *((8, coding, "v5e") for coding in CODINGS),
    (4, "binary", "7x"),
]


@pytest.mark.parametrize(("bits", "coding", "generation"), KERNELS)
def test_the_tpu_kernel_is_exact(bits, coding, generation):
    planes, values = drawn(1300, 70, bits, coding)
    x = whole((3, 1300), -128, 127, jnp.int8)
    y = tpu.matmul(x, planes, coding, generation=generation, interpret=True)
    np.testing.assert_array_equal(y, np.asarray(x, np.int64) @ values)


def test_sums_of_scaled_signs_are_those_of_the_dense_matrix_and_so_are_their_gradients():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (3, 256, 10))
    scales, bias = rng.uniform(size=(3, 4, 10)), rng.normal(size=(4, 10))
    signs = (2 * bits - 1) * np.repeat(scales, 64, axis=1)
    matrix = np.sum(signs, axis=0) + np.repeat(bias, 64, axis=0)
    planes = pack_planes(jnp.asarray(bits[0] + 2 * bits[1] + 4 * bits[2]), 3)
    x = jnp.asarray(rng.normal(size=(2, 256)), jnp.float32)

    def product(x):
        given = (jnp.asarray(part, jnp.float32) for part in (scales, bias))
        return binary_coded_matmul(x, planes, *given, group=64)

    np.testing.assert_allclose(product(x), np.asarray(x, np.float64) @ matrix, atol=1e-3)
    dx = jax.grad(lambda x: jnp.sum(product(x)))(x)
    np.testing.assert_allclose(dx, np.ones((2, 10)) @ matrix.T, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coding": "bipolr"}, "'bipolr' is not known; nearest: bipolar"),
        ({"x": jnp.ones((2, 256))}, "x is float32"),
        ({"x": jnp.ones((2, 300), jnp.int8)}, r"300 features takes uint32 \[bits, 16, N\]"),
        ({"planes": jnp.zeros((9, 8, 4), jnp.uint32)}, "9 planes; codes have 1 to 8 bits"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    arguments = {"x": jnp.ones((2, 256), jnp.int8), "planes": jnp.zeros((2, 8, 4), jnp.uint32)}
    with pytest.raises(ValueError, match=words):
        bit_planes_matmul(**{**arguments, **change})


def test_cost_grows_with_planes_in_bytes_only():
    few, many = cost(16, 4096, 11008, 2), cost(16, 4096, 11008, 4)
    assert few[0] == many[0] == 2 * 16 * 4096 * 11008
    assert many[1] - few[1] == 4096 * 11008 // 4


@on_every_generation
def test_planes_are_read_once_and_codes_are_not_kept(generation):
    kind = jax.ShapeDtypeStruct
    planes = kind((3, 128, 1280), jnp.uint32)
    for dtype in (jnp.int8, jnp.uint8):
        compiled = compile_and_fit(
            lambda x, planes: bit_planes_matmul(x, planes, coding="signed"),
            (kind((16, 4096), dtype), planes),
            generation,
            kernels=1,
        )
        assert compiled.temp_bytes < 4096 * 1280  # codes of 8 bits
