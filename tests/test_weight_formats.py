"""Weight formats: each multiplies as the matrix it stands for, in float64, and survives what a
model does to its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_formats import CODED, MAKERS, make, matrix

import weights
from weights import (
    ActQuant,
    LowRank,
    codebook,
    float4,
    grouped,
    int8,
    lut,
    mixed,
    second_order,
    sparse_outlier,
)
from weights import normal_float as nf4

FORMATS = (*MAKERS, *CODED)
HALF_RAMP = np.arange(64) - 31.5


def wide(x):
    return np.asarray(x).astype(np.float64)


@jax.jit
def uses(weight, x, y, ids):
    """Everything that a model may ask of a matrix, in one program."""
    return {
        "dense": weights.dequantize(weight),
        "product": weights.matmul(x, weight),
        "row": weights.matmul(x[0], weight),
        "transposed": weights.matmul_transposed(y, weight),
        "rows": weights.lookup(weight, ids),
    }


@pytest.mark.parametrize("name", MAKERS)
def test_products_transposes_and_rows_are_those_of_the_matrix(name):
    weight = make(name, matrix(64, 24))
    x, y, ids = matrix(5, 64, 1), matrix(3, 24, 2), jnp.asarray([[0, 63], [17, 64]])
    dense = None
    for form in (weight, jax.jit(weights.prepare, static_argnums=1)(weight, "cpu")):
        found = uses(form, x, y, ids)
        dense = wide(found["dense"]) if dense is None else dense
        loose = name == "codebook" and form is not weight  # prepared in bfloat16
        close = {"rtol": 1e-2, "atol": 1e-2} if loose else {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(found["product"], wide(x) @ dense, **close)
        np.testing.assert_allclose(found["row"], wide(x[0]) @ dense, **close)
        np.testing.assert_allclose(found["transposed"], wide(y) @ dense.T, **close)
        expected = np.stack([dense[[0, 63]], [dense[17], np.zeros(24)]])
        np.testing.assert_allclose(found["rows"], expected, rtol=1e-6, atol=1e-6)
        assert weights.nbytes(form) == weights.nbytes(weight)
    assert weight.shape == (64, 24)
    assert weights.size(weight) == 64 * 24


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def grouped_uses(w, x, bits, group, symmetric, double):
    weight = grouped.quantize(w, bits, group, symmetric=symmetric)
    if double:
        scale = second_order.double(weight.scale.astype(jnp.float32), 8)
        weight = dataclasses.replace(weight, scale=scale)
    codes = weights.codes.elements(weight.codes, "words", bits, w.shape[0])
    prepared = weights.prepare(weight, "cpu")
    products = weights.matmul(x, weight), weights.matmul(x, prepared)
    scale, zero = second_order.values_of(weight.scale), second_order.values_of(weight.zero)
    rows = weights.lookup(weight, jnp.arange(w.shape[0]))
    return codes, scale, zero, products, rows, weight.dequantize()


@settings(max_examples=12, deadline=None)
@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 4),
    group=st.sampled_from([1, 3, 16, 64]),
    columns=st.integers(1, 9),
    symmetric=st.booleans(),
    double=st.booleans(),
)
def test_groups_of_any_size_and_bits_multiply_as_their_codes_say(
    bits, groups, group, columns, symmetric, double
):
    rows = groups * group
    w, x = matrix(rows, columns, bits), matrix(4, rows, 9)
    found = grouped_uses(w, x, bits, group, symmetric, double)
    codes, scale, zero, products, looked_up, dense = found
    zero = 2 ** (bits - 1) if symmetric else wide(zero)
    step = np.repeat(wide(scale), group, 0)
    zeros = np.repeat(np.broadcast_to(zero, scale.shape), group, 0)
    expected = (wide(codes) - zeros) * step
    np.testing.assert_allclose(dense, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(looked_up, expected, rtol=1e-6, atol=1e-7)
    if not double:  # the ends may be short of the range by the rounding of its float16 scale
        inner = (wide(codes) > 0) & (wide(codes) < 2**bits - 1)
        assert (np.abs(expected - wide(w)) <= np.where(inner, 0.5005, 0.6) * step + 1e-5).all()
    for product in products:
        np.testing.assert_allclose(product, wide(x) @ expected, rtol=1e-4, atol=1e-5)


@jax.jit
def stacked_uses(x, stack, layers):
    looped = x
    for layer in layers:
        looped = weights.matmul(looped, layer)
    return {
        "scanned": jax.lax.scan(lambda h, w: (weights.matmul(h, w), None), x, stack)[0],
        "looped": looped,
        "mapped": jax.vmap(weights.matmul, (None, 0))(x, stack),
        "each": jnp.stack([weights.matmul(x, layer) for layer in layers]),
        "dense_stack": stack.dequantize(),
        "dense": jnp.stack([layer.dequantize() for layer in layers]),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_scans_maps_compiles_and_comes_back_from_a_checkpoint(name):
    layers = [make(name, matrix(64, 64, seed)) for seed in range(2)]
    stack = weights.stack(layers)
    found = stacked_uses(matrix(2, 64, 5), stack, layers)
    np.testing.assert_allclose(found["scanned"], found["looped"], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found["mapped"], found["each"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["dense_stack"], found["dense"], rtol=1e-6, atol=1e-7)
    assert weights.size(stack) == 2 * 64 * 64
    assert weights.bits_per_weight(stack) == pytest.approx(
        np.mean([weights.bits_per_weight(layer) for layer in weights.unstack(stack)])
    )
    tree = {"layers": {"000-002": {"up": {"kernel": stack}}}}
    arrays, description = weights.to_arrays(tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays))
    restored = weights.from_arrays(arrays, json.loads(json.dumps(description)))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


@jax.jit
def gradients(x, dy, weight):
    def loss(x, weight):
        return jnp.sum(weights.matmul(x, weight) * dy)

    def through(weight):
        return jnp.sum(weights.dequantize(weight) * (x.T @ dy))

    dx, dw = jax.grad(loss, (0, 1), allow_int=True)(x, weight)
    return dx, real(dw), real(jax.grad(through, allow_int=True)(weight)), weight.dequantize()


def real(tree):
    """The leaves that have gradients; whole numbers have float0."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_reach_inputs_and_real_parts_and_pass_codes_by(name):
    weight = make(name, matrix(64, 8))
    x, dy = matrix(3, 64, 1), matrix(3, 8, 2)
    dx, dw, expected, dense = gradients(x, dy, weight)
    np.testing.assert_allclose(dx, wide(dy) @ wide(dense).T, rtol=1e-4, atol=1e-5)
    inexact = [x for x in jax.tree.leaves(weight) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert [leaf.dtype for leaf in dw] == [leaf.dtype for leaf in inexact]
    if name in CODED:
        return
    for found, wanted in zip(dw, expected, strict=True):
        tolerance = 1e-2 if found.dtype != jnp.float32 else 2e-4
        size = max(1e-6, np.abs(wide(wanted)).max())
        np.testing.assert_allclose(wide(found) / size, wide(wanted) / size, atol=tolerance)


def test_table_codes_are_those_of_bitsandbytes():
    golden = {
        nf4: "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff",
        float4: "bbbbbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333",
    }
    for module, text in golden.items():
        weight = module.quantize(jnp.asarray(HALF_RAMP[:, None]))
        codes = weights.codes.elements(weight.codes, "words", 4, 64)[:, 0]
        assert "".join(f"{code:x}" for code in np.asarray(codes)) == text
        assert weight.scale[0, 0] == 31.5


def test_double_quantization_codes_scales_by_the_dynamic_map():
    table = second_order.dynamic_map()
    checks = {0: -0.99296874, 126: -5.5e-7, 127: 0, 254: 0.99296874, 255: 1}
    for index, value in checks.items():
        assert table[index] == pytest.approx(value, rel=1e-6)
    scale = np.random.default_rng(0).uniform(0.5, 2, (4, 100))
    coded = second_order.double(jnp.asarray(scale))
    sequence = scale.T.reshape(-1) - scale.mean()
    found = np.zeros_like(sequence)
    for start in range(0, 400, 256):
        block = sequence[start : start + 256]
        most = np.abs(block).max()
        place = np.abs(block[:, None] / most - table.astype(np.float64)).argmin(axis=1)
        found[start : start + 256] = table[place] * most
    found = (found + scale.mean()).reshape(100, 4).T
    np.testing.assert_allclose(coded.materialise(), found, rtol=1e-5)


def test_bits_are_counted_honestly():
    big = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)

    def bits(function):
        return weights.bits_per_weight(jax.eval_shape(function, big))

    assert bits(lambda w: grouped.quantize(w, 4, 128)) == pytest.approx(4.15625)
    assert bits(lambda w: grouped.quantize(w, 3, 128, symmetric=True)) == pytest.approx(3.125)
    assert bits(lambda w: nf4.quantize(w, 64, double=True)) == pytest.approx(4.127, abs=1e-3)
    assert bits(int8.quantize) == pytest.approx(8 + 32 / 4096)
    slim = make("slim", matrix(64, 24))
    assert weights.nominal_bits(slim) == 3
    assert weights.nominal_bits(make("codebook", matrix(64, 24))) == 1
    assert weights.bits_per_weight(matrix(4, 4).astype(jnp.bfloat16)) == 16


def test_rounding_errors_are_those_measured_in_float64_for_normal_weights():
    w = jnp.asarray(np.random.default_rng(5).standard_normal((512, 512)), jnp.float32)
    oracles = {
        0.00846: lambda w: nf4.quantize(w, 64),
        0.01490: lambda w: float4.quantize(w, 64),
        0.01015: lambda w: grouped.quantize(w, 4, 128),
        0.07530: lambda w: grouped.quantize(w, 3, 128, grid=grouped.Grid(3, "odd")),
    }
    for oracle, maker in oracles.items():
        off = wide(jax.jit(lambda w: maker(w).dequantize())(w)) - wide(w)
        assert np.mean(off**2) / np.mean(wide(w) ** 2) == pytest.approx(oracle, rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_coded_input_multiplies_whole_numbers_exactly(bits, mode, symmetric):
    x = wide(matrix(6, 96, 1)) * np.asarray([1, 2, 3, 4, 5, 0])[:, None]
    half = 2 ** (bits - 1)
    scale, zero = (jnp.float32(0.03), jnp.float32(5)) if mode == "static" else (None, None)
    act = ActQuant(scale, None if symmetric else zero, bits, mode, symmetric)
    weight = int8.quantize(matrix(96, 10), act=act)
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    if mode == "tensor":
        low, high = np.full(6, low.min()), np.full(6, high.max())
    if symmetric:
        step, zeros = np.maximum(-low, high) / (half - 1), np.zeros(6)
        limits = 1 - half, half - 1
    else:
        step, limits = (high - low) / (2 * half - 1), (0, 2 * half - 1)
        zeros = np.round(-low / np.where(step == 0, 1, step))
    if mode == "static":
        step, zeros = np.full(6, 0.03), np.full(6, 0 if symmetric else 5)
    step = np.where(step == 0, 1, step)
    codes = np.clip(np.round(x / step[:, None]) + zeros[:, None], *limits)
    expected = ((codes - zeros[:, None]) @ wide(weight.q)) * step[:, None] * wide(weight.scale)
    y = weights.matmul(jnp.asarray(x, jnp.float32), weight)
    off = np.abs(y - expected) / np.abs(expected).max()
    # A value in the middle of two codes may fall either way in float32.
    assert np.median(off) < 1e-6
    assert off.max() < 0.02
    assert act.fake(jnp.asarray(x, jnp.float32)).shape == x.shape


def test_outliers_of_a_call_are_multiplied_beside_the_codes():
    w = matrix(64, 32)
    x = np.array(matrix(8, 64, 1)) * 10
    x[:, [5, 40]] *= 60

    def error(weight):
        truth = wide(x) @ wide(weight.dequantize())
        return np.abs(wide(weights.matmul(jnp.asarray(x), weight)) - truth).mean()

    plain, apart = error(int8.quantize(w, act=ActQuant())), error(int8.quantize(w, threshold=6.0))
    assert apart < plain / 10
    fixed = int8.quantize(w, act=ActQuant(), outliers=jnp.asarray([5, 40]))
    assert error(fixed) < plain / 5
    crowded = dataclasses.replace(
        int8.quantize(w, threshold=6.0), outlier=int8.Outlier(threshold=6.0, capacity=1)
    )
    assert error(crowded) < 2 * plain  # the channel without room is coded like the rest


def test_an_adapter_drops_inputs_only_with_a_key():
    base = matrix(32, 8)
    weight = LowRank(base, matrix(32, 2, 1), matrix(2, 8, 2), scale=2.0, dropout=0.5)
    x = matrix(4, 32, 3)
    whole = weights.matmul(x, weight)
    np.testing.assert_allclose(whole, wide(x) @ wide(weight.dequantize()), atol=1e-5)
    samples = jax.jit(jax.vmap(lambda key: weights.matmul(x, weight, rng=key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert np.std(samples, axis=0).min() > 0
    np.testing.assert_allclose(np.mean(samples, axis=0), whole, atol=0.03)


def test_layers_that_differ_are_named_and_lists_are_filled_up():
    multiply, dense = jax.jit(weights.matmul), jax.jit(weights.dequantize)
    four, three = (grouped.quantize(matrix(64, 8), bits, 32) for bits in (4, 3))
    with pytest.raises(ValueError, match=r"layer 1: bits 3, not 4.*layer 3: is Int8, not Grouped"):
        weights.stack([four, three, four, int8.quantize(matrix(64, 8))])
    with pytest.raises(ValueError, match=r"layer 1: is float32\[2, 3\], not float32\[2, 2\]"):
        weights.stack([jnp.ones((2, 2)), jnp.ones((2, 3))])
    base = int8.quantize(matrix(64, 8))
    for storage in ("ell", "csr"):
        layers = [
            sparse_outlier.from_residual(base, jnp.where(matrix(64, 8, s) > cut, 1.0, 0), storage)
            for s, cut in ((0, 0.2), (1, 0.1))
        ]
        stack = weights.stack(
            [LowRank(layer, jnp.ones((64, 1)), jnp.ones((1, 8))) for layer in layers]
        )
        x = matrix(3, 64, 4)
        for layer, found in zip(layers, weights.unstack(stack.base), strict=True):
            np.testing.assert_allclose(dense(found), dense(layer))
            np.testing.assert_allclose(multiply(x, found), multiply(x, layer), atol=1e-5)
    apart = [int8.quantize(matrix(64, 8), outliers=jnp.arange(n), act=ActQuant()) for n in (1, 3)]
    for layer, found in zip(apart, weights.unstack(weights.stack(apart)), strict=True):
        np.testing.assert_array_equal(multiply(x, found), multiply(x, layer))
        np.testing.assert_array_equal(dense(found), dense(layer))


def test_what_does_not_fit_is_named():
    w = matrix(96, 8)
    with pytest.raises(ValueError, match=r"group=40 does not divide the 96 inputs.* 32, 48"):
        grouped.quantize(w, 4, 40)
    with pytest.raises(ValueError, match="bits=9; a grid has codes of 2 to 8 bits"):
        grouped.quantize(w, 9, 32)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 8\).*takes \(3, 8\)"):
        grouped.from_codes(jnp.zeros((96, 8), int), jnp.ones((2, 8)), bits=4, group=32)
    with pytest.raises(ValueError, match=r"table has shape \(2, 5\); .* only with select"):
        lut.from_codes(jnp.zeros((96, 8), int), jnp.ones((2, 5)), jnp.ones((1, 8)))
    with pytest.raises(ValueError, match=r"each of 0\.\.3 is held once"):
        mixed.join([w, w], ([0, 1], [1, 3]))
    with pytest.raises(ValueError, match="do not fit"):
        codebook.make(jnp.zeros((4, 8, 1), int), jnp.ones((2, 16, 8, 1)), jnp.ones(8))
    with pytest.raises(ValueError, match="mode='row' is not one of token, tensor, static"):
        ActQuant(mode="row")
    with pytest.raises(ValueError, match="a scale is given for 'static' only"):
        weights.matmul(matrix(2, 96), int8.quantize(w, act=ActQuant(mode="static")))
    with pytest.raises(ValueError, match="storage='coo' is not one of ell, csr, dense"):
        sparse_outlier.from_residual(w, w, "coo")


def test_experts_take_formats_stacked_over_the_groups():
    kernels = weights.stack([grouped.quantize(matrix(64, 8, seed), 4, 32) for seed in range(3)])
    x, sizes = matrix(9, 64, 4), jnp.asarray([4, 0, 5])
    y = weights.grouped_matmul(x, kernels, sizes)
    dense = wide(kernels.dequantize())
    expected = np.concatenate([wide(x[:4]) @ dense[0], wide(x[4:]) @ dense[2]])
    np.testing.assert_allclose(y, expected, atol=1e-5)
