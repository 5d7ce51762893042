"""The grouped product against float64 NumPy: any sizes of groups, gradients, formats, and what it
costs.
"""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_aot import on_a_described_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from tpu_aot import REASON, compile_and_fit

import weights
from kernels_pallas.gpu_topology import compile_for
from kernels_pallas.grouped_matmul import IMPLEMENTATIONS, SHAPES, grouped_matmul, grouped_outer

NAMES = [None, *IMPLEMENTATIONS]


def _arrays(rows, groups, d_in, d_out, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, d_in), (groups, d_in, d_out), (rows, d_out))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _owners(sizes, rows):
    """The group of each row, -1 for rows after the last group."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return np.concatenate([owners, np.full(rows - len(owners), -1)])


def _matmul(x, w, sizes):
    out = np.zeros((len(x), w.shape[2]))
    for row, owner in enumerate(_owners(sizes, len(x))):
        if owner >= 0:
            out[row] = x[row].astype(np.float64) @ w[owner]
    return out


def _outer(x, g, sizes):
    out = np.zeros((len(sizes), x.shape[1], g.shape[1]))
    for row, owner in enumerate(_owners(sizes, len(x))):
        if owner >= 0:
            out[owner] += np.outer(x[row].astype(np.float64), g[row])
    return out


ROWS = (1, 90, 300)
"""One block of rows and less, and several."""


@functools.partial(jax.jit, static_argnums=4)
def _with_gradients(x, w, g, counts, name):
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, counts, implementation=name), x, w)
    return out, *pull(g)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from(ROWS),
    cuts=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_each_row_meets_its_groups_matrix_and_so_do_the_gradients(name, rows, cuts, seed):
    """Equal cuts make empty groups; rows after the last cut belong to none."""
    sizes = np.diff([0, *sorted(round(cut * rows) for cut in cuts)])
    x, w, g = _arrays(rows, len(sizes), 5, 7, seed)
    out, of_x, of_w = _with_gradients(x, w, g, jnp.asarray(sizes, jnp.int32), name)
    near = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(out, _matmul(x, w, sizes), **near)
    np.testing.assert_allclose(of_x, _matmul(g, w.swapaxes(1, 2), sizes), **near)
    np.testing.assert_allclose(of_w, _outer(x, g, sizes), **near)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(0, 300, 0), (0, 0, 0), (300, 0, 0), (1, 298, 1), (128, 32, 32)])
def test_one_group_may_have_all_rows_or_none(name, sizes):
    x, w, g = _arrays(300, 3, 4, 6)
    counts = jnp.asarray(sizes, jnp.int32)
    out = grouped_matmul(x, w, counts, implementation=name)
    np.testing.assert_allclose(out, _matmul(x, w, sizes), rtol=1e-4, atol=1e-4)
    outer = grouped_outer(x, g, counts, implementation=name)
    np.testing.assert_allclose(outer, _outer(x, g, sizes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["blocks", "ragged"])
def test_forward_mode_and_second_derivatives_equal_the_definitions(name):
    x, w, _ = _arrays(70, 3, 4, 5)
    counts = jnp.asarray((40, 0, 25), jnp.int32)

    def curvature(implementation):
        def value(x, w):
            y = grouped_matmul(x, w, counts, implementation=implementation)
            back = grouped_matmul(
                jnp.sin(y), w, counts, transposed=True, implementation=implementation
            )
            return jnp.sum(back**2) / 100

        def product(x, w):
            return jax.jvp(jax.grad(value, (0, 1)), (x, w), (x * 2, w + 1))[1]

        return jax.jit(product)(x, w)

    for one, other in zip(curvature(name), curvature("plain"), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def test_bfloat16_rows_sum_in_float32_and_leave_a_float32_gradient():
    x, w, g = _arrays(512, 2, 64, 8)
    sizes = (500, 12)
    x16, g16 = jnp.asarray(x, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16)
    counts = jnp.asarray(sizes, jnp.int32)
    out, pull = jax.vjp(lambda w: grouped_matmul(x16, w, counts), jnp.asarray(w))
    assert out.dtype == jnp.bfloat16
    (of_w,) = pull(g16)
    assert of_w.dtype == jnp.float32
    exact = _outer(np.asarray(x16, np.float32), np.asarray(g16, np.float32), sizes)
    np.testing.assert_allclose(of_w, exact, rtol=1e-4, atol=1e-3)


def test_a_mapped_call_has_its_own_groups_for_each_row_of_the_map():
    x, w, _ = _arrays(40, 3, 4, 5)
    sizes = np.asarray([(10, 20, 10), (0, 0, 7)], np.int32)
    out = jax.jit(jax.vmap(grouped_matmul, (None, None, 0)))(x, w, sizes)
    for one, counts in zip(out, sizes, strict=True):
        np.testing.assert_allclose(one, _matmul(x, w, counts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("platform", "devices", "ragged"), [("tpu", 1, True), ("cuda", 1, False), ("cuda", 2, True)]
)
def test_where_xla_has_a_kernel_or_must_partition_the_ragged_instruction_is_used(
    platform, devices, ragged
):
    """On one NVIDIA GPU, which XLA has none for, a loop."""
    x, w, _ = _arrays(40, 3, 4, 5)
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    product = jax.jit(
        jax.grad(lambda w, x, s: grouped_matmul(x, w, s).sum()), in_shardings=(place,) * 3
    )
    traced = product.trace(w, x, jnp.asarray((10, 20, 10), jnp.int32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text, "while" in text) == (ragged, not ragged)


@on_a_described_gpu
def test_no_row_is_copied_for_each_group_on_a_gpu():
    shape = SHAPES["qwen15_moe_a27b"]
    arrays = ((shape.rows, shape.d_in), (shape.groups, shape.d_in, shape.d_out))
    x, w = (jax.ShapeDtypeStruct(array, jnp.bfloat16) for array in arrays)
    sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
    compiled = compile_for(grouped_matmul, (x, w, sizes), "h100")
    assert compiled.temp_bytes < 2 * shape.rows * shape.d_in


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")
@pytest.mark.parametrize("generation", ["v5e", "v5p"])
def test_the_products_of_a_layer_compile_to_ragged_ones_for_a_tpu(generation):
    shape = SHAPES["qwen15_moe_a27b"]
    x = jax.ShapeDtypeStruct((shape.rows, shape.d_in), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((shape.groups, shape.d_in, shape.d_out), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)

    def step(x, w, sizes):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return pull(out)

    compiled = compile_and_fit(step, (x, w, sizes), generation)
    assert len(re.findall(r'"is_ragged_dot":true|%ragged-dot\S* = ', compiled.text)) >= 3
    dense = shape.rows * shape.groups * max(shape.d_in, shape.d_out)
    assert compiled.temp_bytes < dense  # no row is copied for each group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved:
    """A stand-in for a quantized format: the matrix is twice what is stored."""

    half: jax.Array

    def matmul(self, x, rng=None):
        return x @ (2 * self.half).astype(x.dtype)

    def dequantize(self, dtype=jnp.float32):
        return (2 * self.half).astype(dtype)

    def nbytes(self):
        return self.half.nbytes

    def prepare(self, backend):
        return self

    def specs(self, spec):
        return Halved(spec)


@pytest.mark.parametrize("sizes", [(0, 33, 100, 0), (1, 0, 0, 2), (64, 32, 31, 23)])
def test_a_weight_format_with_an_axis_of_experts_is_multiplied_group_by_group(sizes):
    x, w, g = _arrays(150, 4, 5, 6)
    counts = jnp.asarray(sizes, jnp.int32)

    def run(x, half):
        return weights.grouped_matmul(x, Halved(half), counts)

    out, pull = jax.vjp(run, x, w / 2)
    of_x, of_half = pull(g)
    np.testing.assert_allclose(out, _matmul(x, w, sizes), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_x, _matmul(g, w.swapaxes(1, 2), sizes), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_half, 2 * _outer(x, g, sizes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [lambda w: w, lambda w: Halved(w / 2)], ids=["array", "format"])
def test_the_matrices_of_one_layer_need_not_be_cut_out_of_their_stack(kind):
    x, w, _ = _arrays(60, 6, 5, 7)
    sizes = (0, 41, 8)
    stack = kind(jnp.asarray(w).reshape(2, 3, 5, 7))

    def run(layer):
        weight = weights.OfLayer(stack, layer)
        assert weight.shape == (3, 5, 7)
        return weights.grouped_matmul(jnp.asarray(x), weight, jnp.asarray(sizes))

    expected = _matmul(x, w[3:], sizes)
    np.testing.assert_allclose(jax.jit(run)(jnp.int32(1)), expected, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_and_names_say_what_would_be_right():
    x, w, _ = _arrays(8, 2, 4, 5)
    with pytest.raises(
        ValueError, match=r"w \[groups, in, out\]; got x \(8, 4\) and w \(2, 5, 4\)"
    ):
        grouped_matmul(x, w.swapaxes(1, 2), jnp.asarray((4, 4)))
    with pytest.raises(ValueError, match="one whole number for each of the 2 groups"):
        grouped_matmul(x, w, jnp.asarray((4, 2, 2)))
    with pytest.raises(ValueError, match="'block' is not known; nearest: blocks"):
        grouped_matmul(x, w, jnp.asarray((4, 4)), implementation="block")


@pytest.mark.slow
def test_on_a_cpu_the_cost_is_that_of_the_rows_and_not_of_the_number_of_groups():
    def seconds(function, *arguments):
        run, arguments = jax.jit(function), jax.device_put(arguments)
        jax.block_until_ready(run(*arguments))
        times = []
        for _ in range(7):
            start = time.process_time()  # of all threads, and none of other programs
            jax.block_until_ready(run(*arguments))
            times.append(time.process_time() - start)
        return min(times)

    rows, d_in, d_out = 2048, 256, 512
    taken = {}
    for groups in (4, 64):
        x, w, _ = _arrays(rows, groups, d_in, d_out)
        sizes = np.zeros(groups, np.int32)
        sizes[:: groups // 4] = rows // 4
        taken[groups] = seconds(grouped_matmul, x, w, jnp.asarray(sizes))
    assert taken[64] < 3 * taken[4]
    dense = seconds(lambda x, w: x @ w, x, w[0])
    assert taken[4] < 3 * dense
