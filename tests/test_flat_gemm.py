"""The flat product by each route against float64, and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpu_aot import compile_and_fit, on_every_generation

from kernels_pallas import tuning
from kernels_pallas.flat_gemm import IMPLEMENTATIONS, SHAPES, cost, flat_gemm, reference, routes
from kernels_pallas.flat_gemm.tune import ROUTE
from kernels_pallas.tuning.key import code_version
from kernels_pallas.tuning.store import Choice


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def f64(x):
    return np.asarray(jnp.asarray(x, jnp.float32), np.float64)


@settings(max_examples=12, deadline=None)
@given(
    m=st.sampled_from([0, 1, 5, 9]),
    k=st.sampled_from([1, 100, 128, 300]),
    n=st.sampled_from([1, 33, 1030]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    route=st.sampled_from(IMPLEMENTATIONS),
)
def test_every_route_is_the_product(m, k, n, dtype, route):
    x, w = normal((m, k), dtype), normal((k, n), dtype, seed=1)
    y = flat_gemm(x, w, dtype=jnp.float32, implementation=route)
    bound = 2**-22 * k * np.max(np.abs(f64(x)), initial=0) * np.max(np.abs(f64(w)))
    assert np.max(np.abs(f64(y) - f64(x) @ f64(w)), initial=0) <= bound
    assert flat_gemm(x, w, implementation=route).dtype == dtype


@pytest.mark.parametrize("route", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_product_with_leading_axes(route):
    x, w, dy = normal((1, 1, 160)), normal((160, 20), seed=1), normal((1, 1, 20), seed=2)

    def loss(x, w):
        return jnp.sum(dy * flat_gemm(x, w, implementation=route))

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    np.testing.assert_allclose(dx, dy @ w.T, atol=1e-4)
    np.testing.assert_allclose(dw, x[0].T @ dy[0], atol=1e-4)


def test_the_route_is_what_was_measured_for_the_call_and_else_the_default():
    x, w = normal((4, 256), jnp.bfloat16), normal((256, 64), jnp.bfloat16)
    with tuning.use(only=True):
        assert routes.choose(x, w) == "library"
        assert routes.choose(x[:1], w) == "padded"
        assert routes.choose(f64(x).astype(np.float32), f64(w).astype(np.float32)) == "library"
        assert routes.choose(jnp.zeros((0, 256), jnp.bfloat16), w) == "library"
    key = routes.tuning_key(4, 256, 64, dtype=jnp.bfloat16).bucket()
    choice = Choice({"route": "padded"}, code_version("flat_gemm.routes"), "measured")
    found = tuning.best(key, {"route": "library"}, table={key: choice})
    assert found == {"route": "padded"}
    with tuning.use({"flat_gemm.routes": {"route": "vector"}}):
        assert routes.choose(x[:1], w) == "vector"
    with (
        tuning.use({"flat_gemm.routes": {"route": "vector"}}),
        pytest.raises(ValueError, match="do not fit"),
    ):
        routes.choose(x, w)  # a vector is one row


def test_tuning_compares_the_routes_that_take_so_many_rows():
    (key, _) = ROUTE.keys(SHAPES["small_up_1"], "cpu")
    assert {row["route"] for row in ROUTE.candidates(key)} == set(IMPLEMENTATIONS)
    (key, _) = ROUTE.keys(SHAPES["small_up_8"], "cpu")
    assert {row["route"] for row in ROUTE.candidates(key)} == {"library"}
    case = ROUTE.case(key)
    np.testing.assert_allclose(case.function(*case.arguments), case.plain(*case.arguments), rtol=1)


def test_one_bfloat16_row_meets_no_float32_copy_of_the_matrix():
    w = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
    vector = functools.partial(flat_gemm, implementation="vector")
    compiled = jax.jit(vector).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 512 * 4


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"x \[..., K\] and w \[K, N\]; got \(2, 3\) and \(4, 5\)"):
        flat_gemm(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="'pad' is not known; nearest: padded"):
        flat_gemm(jnp.ones((2, 3)), jnp.ones((3, 5)), implementation="pad")


def test_cost_counts_each_array_once():
    assert cost(8, 128, 64, dtype=jnp.bfloat16) == (2 * 8 * 128 * 64, 2 * (1024 + 8192 + 512))


@on_every_generation
def test_tpus_multiply_few_rows_by_their_own_product(generation):
    shapes = (jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16),)
    w = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    ours = compile_and_fit(flat_gemm, (*shapes, w), generation, kernels=0)
    plain = compile_and_fit(
        lambda x, w: reference.matmul(x, w).astype(x.dtype), (*shapes, w), generation
    )
    assert (ours.flops, ours.bytes_accessed) == (plain.flops, plain.bytes_accessed)
