"""Products of 8-bit integers against 64-bit ones, and rows of codes against a NumPy replay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpu_aot import compile_and_fit, on_every_generation

from kernels_pallas.int8_matmul import (
    blocks,
    cost,
    int8_matmul,
    quantize_rows,
    reference,
    tpu,
    tpu_quantizer,
)


def codes(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-128, 128, shape), jnp.int8)


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def whole(x):
    return np.asarray(x, np.int64)


@settings(max_examples=12, deadline=None)
@given(
    m=st.sampled_from([0, 1, 5, 80]),
    rows=st.sampled_from([1, 16, 130, 300]),
    columns=st.sampled_from([1, 40]),
)
def test_the_product_on_a_cpu_is_exact(m, rows, columns):
    x, w = codes((m, rows)), codes((rows, columns), seed=1)
    np.testing.assert_array_equal(blocks.product(x, w), whole(x) @ whole(w))


@pytest.mark.parametrize("generation", ["v5e", "7x"])
def test_the_kernel_is_exact_with_and_without_integers_in_the_matrix_unit(generation):
    x = codes((40, 1300)).at[:, :1200].set(-128)  # the largest sums that codes can have
    w = codes((1300, 130), seed=1).at[:1200].set(-128)
    ones = jnp.ones(40), jnp.ones(130)
    y = tpu.int8_matmul(x, w, *ones, generation=generation, dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(y, (whole(x) @ whole(w)).astype(np.float32))


def replayed(x, threshold):
    """LLM.int8()'s row quantizer in NumPy."""
    x = np.asarray(x, np.float32)
    kept = x if threshold is None else np.where(np.abs(x) >= threshold, 0, x)
    most = np.max(np.abs(kept), axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        made = np.clip(np.rint(x * np.where(most > 0, np.float32(127) / most, 0)), -127, 127)
    outlier = np.zeros(x.shape[1], bool)
    if threshold is not None:
        outlier = np.any(np.abs(x) >= threshold, axis=0)
        made[:, outlier] = 0
    return made, most[:, 0] / 127, outlier


@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("kernel", [False, True])
def test_rows_of_codes_are_those_of_a_replay(threshold, kernel):
    x = normal((70, 200), jnp.bfloat16).at[3].set(0)
    if kernel:
        found = tpu_quantizer.quantize_rows(x, threshold, generation="v5e", interpret=True)
    else:
        found = quantize_rows(x, threshold)
    wanted = replayed(x, threshold)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=2e-7)
    np.testing.assert_array_equal(found[2], wanted[2])


def test_rows_that_are_not_finite_stay_so_and_alone():
    x = normal((4, 64)).at[1, 5].set(jnp.nan).at[2, 6].set(jnp.inf)
    y = int8_matmul(x, codes((64, 8), seed=1), jnp.ones(8))
    finite = np.all(np.isfinite(np.asarray(y)), axis=1)
    np.testing.assert_array_equal(finite, [True, False, False, True])


@pytest.mark.parametrize(("factor", "error"), [(1, 0.0105), (20, 0.073)])
def test_outlier_channels_cost_what_the_study_of_the_method_says(factor, error):
    """K = N = 512, 1024 tokens, four input channels times `factor` and their weights divided."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1024, 512)), rng.normal(size=(512, 512)) / np.sqrt(512)
    x[:, :4], w[:4] = x[:, :4] * factor, w[:4] / factor
    most = np.max(np.abs(w), axis=0)
    made = np.rint(127 * w / most).astype(np.int8)
    y = int8_matmul(jnp.asarray(x, jnp.float32), jnp.asarray(made), jnp.asarray(most / 127))
    exact = x @ w
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) == pytest.approx(error, rel=0.05)


def test_gradients_pass_through_the_rounding():
    x, w, scales, dy = normal((2, 3, 96)), codes((96, 10)), normal(10, seed=2), normal((2, 3, 10))

    def loss(x, scales):
        return jnp.sum(dy * int8_matmul(x, w, scales))

    dx, of_scales = jax.jit(jax.grad(loss, (0, 1)))(x, scales)
    matrix = whole(w) * np.asarray(scales, np.float64)
    np.testing.assert_allclose(dx, np.asarray(dy) @ matrix.T, atol=1e-3)
    assert not np.any(of_scales)


def test_terms_are_added_before_the_result_is_rounded_and_have_their_gradients():
    x, w, scales = normal((2, 3, 96)), codes((96, 10)), normal(10, seed=2)
    bias, addend = normal(10, seed=3), normal((2, 3, 10), jnp.bfloat16, seed=4)

    def product(bias, addend):
        return int8_matmul(x, w, scales, bias=bias, addend=addend)

    y, pull = jax.vjp(product, bias, addend)
    alone = np.asarray(int8_matmul(x, w, scales), np.float64)
    expected = alone + np.asarray(bias) + np.asarray(addend, np.float64)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-4)
    of_bias, of_addend = pull(jnp.ones_like(y))
    np.testing.assert_array_equal(of_bias, np.full(10, 6))
    assert of_addend.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(of_addend, np.float32), np.ones((2, 3, 10)))
    quantized, of_x, _ = quantize_rows(x)
    given = int8_matmul(quantized, w, scales, of_x, bias=bias, addend=addend, dtype=jnp.float32)
    np.testing.assert_array_equal(given, y)


def test_given_codes_take_their_scales():
    x, w = codes((2, 3, 96)), codes((96, 10), seed=1)
    of_x, of_w = jnp.abs(normal((2, 3))), jnp.abs(normal(10, seed=1))
    y = int8_matmul(x, w, of_w, of_x, dtype=jnp.float32)
    exact = (whole(x) @ whole(w)) * np.asarray(of_x)[..., None] * np.asarray(of_w)
    np.testing.assert_allclose(y, exact, rtol=1e-6)
    assert int8_matmul(x, w, of_w, of_x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": codes((95, 10))}, r"got x float32\(3, 96\) and codes int8\(95, 10\)"),
        ({"scales": jnp.ones(9)}, r"scales has shape \(9,\)"),
        ({"x": codes((3, 96))}, "x is int8 without x_scales"),
        ({"x_scales": jnp.ones(3)}, "x is float32 with x_scales"),
        ({"x": codes((3, 96)), "x_scales": jnp.ones(2)}, r"x_scales has shape \(2,\)"),
        ({"bias": jnp.ones(9)}, r"bias has shape \(9,\); .* take \(10,\)"),
        ({"addend": jnp.ones((2, 10))}, r"addend has shape \(2, 10\); .* take \(3, 10\)"),
        ({"implementation": "gpu2"}, "'gpu2' is not known"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    arguments = {"x": normal((3, 96)), "codes": codes((96, 10)), "scales": jnp.ones(10)}
    with pytest.raises(ValueError, match=words):
        int8_matmul(**{**arguments, **change})
    with pytest.raises(ValueError, match="threshold=-1"):
        quantize_rows(arguments["x"], -1)


def test_sums_that_could_overflow_are_refused():
    assert 127**2 * reference.MOST_ROWS < 2**31
    wide = jnp.zeros((1, reference.MOST_ROWS + 1), jnp.int8)
    with pytest.raises(ValueError, match="do not fit 32 bits"):
        int8_matmul(wide, wide.T, jnp.ones(1), jnp.ones(1))


def test_cost_counts_each_array_once():
    assert cost(16, 4096, 14336) == (
        2 * 16 * 4096 * 14336,
        4096 * 14336 + 16 * 4096 + 4 * (16 + 14336) + 2 * 16 * 14336,
    )


@on_every_generation
def test_rows_are_quantized_in_one_kernel_and_the_product_is_an_integer_one(generation):
    def step(x, w, scales):
        return int8_matmul(x, w, scales)

    kind = jax.ShapeDtypeStruct
    shapes = (kind((64, 1024), jnp.bfloat16), kind((1024, 512), jnp.int8), kind((512,), "float32"))
    kernels = 2 if generation == "7x" else 1
    compiled = compile_and_fit(step, shapes, generation, kernels=kernels)
    if kernels == 1:
        assert "s32[64,512]" in compiled.text
    named = compile_and_fit(
        lambda x, w, a, b: int8_matmul(x, w, a, b, implementation="tpu"),
        (kind((64, 1024), jnp.int8), *shapes[1:], kind((64,), "float32")),
        generation,
        kernels=1,
    )
    assert named.temp_bytes < 2**20
