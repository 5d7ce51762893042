"""Seam 1: any registered format at a kernel's path works through the same layer, checkpoint and
sharding.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import weights


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["offset"])
@dataclasses.dataclass(frozen=True)
class Rounded:
    """An 8-bit format as a later file would write it: `scale[n] * (codes - offset)`."""

    codes: jax.Array
    scale: jax.Array
    offset: int = 0

    def matmul(self, x, rng=None):
        product = jnp.matmul(x, (self.codes - self.offset).astype(x.dtype))
        return (product.astype(jnp.float32) * self.scale).astype(x.dtype)

    def dequantize(self, dtype=jnp.float32):
        return ((self.codes - self.offset) * self.scale).astype(dtype)

    def nbytes(self):
        return self.codes.size + self.scale.size * 4

    def prepare(self, backend):
        return self

    def specs(self, spec):
        return dataclasses.replace(self, codes=spec, scale=P(spec[-1]))


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A format over another format: `base + a b`."""

    base: object
    a: jax.Array
    b: jax.Array

    def matmul(self, x, rng=None):
        return weights.matmul(x, self.base) + (x @ self.a) @ self.b

    def dequantize(self, dtype=jnp.float32):
        return (weights.dequantize(self.base) + self.a @ self.b).astype(dtype)

    def nbytes(self):
        return weights.nbytes(self.base) + 4 * (self.a.size + self.b.size)

    def prepare(self, backend):
        return self

    def specs(self, spec):
        return Adapted(weights.specs(self.base, spec), P(spec[0], None), P(None, spec[1]))


def rounded(seed: int, d_in: int, d_out: int) -> Rounded:
    key = jax.random.key(seed)
    codes = jax.random.randint(key, (d_in, d_out), -127, 128, dtype=jnp.int8)
    return Rounded(codes.astype(jnp.int32), jnp.linspace(0.01, 0.02, d_out), offset=3)


@settings(max_examples=16, deadline=None)
@given(
    lead=st.sampled_from([(), (3,), (2, 1)]),
    d_in=st.sampled_from([1, 6, 17]),
    d_out=st.sampled_from([1, 17]),
    bias=st.booleans(),
)
def test_linear_equals_float64_for_arrays_and_formats(lead, d_in, d_out, bias):
    x = np.random.default_rng(0).standard_normal((*lead, d_in)).astype(np.float32)
    offset = np.arange(d_out, dtype=np.float32)
    dense = np.random.default_rng(1).standard_normal((d_in, d_out)).astype(np.float32)
    for kernel in (jnp.asarray(dense), rounded(2, d_in, d_out)):
        params = {"kernel": kernel} | ({"bias": jnp.asarray(offset)} if bias else {})
        expected = x.astype(np.float64) @ np.asarray(weights.dequantize(kernel), np.float64)
        expected = expected + (offset if bias else 0)
        np.testing.assert_allclose(weights.linear(params, x), expected, rtol=2e-5, atol=2e-5)


def test_float32_masters_multiply_in_the_type_of_the_activations():
    x = jnp.ones((2, 4), jnp.bfloat16)
    product = weights.matmul(x, jnp.full((4, 3), 1.001, jnp.float32))
    assert product.dtype == jnp.bfloat16
    gradient = jax.grad(lambda w: weights.matmul(x, w).astype(jnp.float32).sum())(jnp.ones((4, 3)))
    assert gradient.dtype == jnp.float32


def test_a_stack_of_formats_runs_under_scan_like_the_layers_of_a_model():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[rounded(i, 6, 6) for i in range(3)])
    x = jnp.ones((2, 6))
    scanned, _ = jax.lax.scan(lambda h, w: (weights.matmul(h, w), None), x, stack)
    looped = x
    for i in range(3):
        looped = weights.matmul(looped, rounded(i, 6, 6))
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)


def test_nested_formats_survive_the_plain_arrays_of_a_checkpoint(monkeypatch):
    monkeypatch.setitem(weights.FORMATS, "rounded", Rounded)
    monkeypatch.setitem(weights.FORMATS, "adapted", Adapted)
    kernel = Adapted(rounded(0, 4, 5), jnp.ones((4, 2)), jnp.ones((2, 5)))
    params = {"layers": {"000-001": {"query": {"kernel": kernel, "bias": jnp.zeros(5)}}}}
    arrays, description = weights.to_arrays(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays))
    restored = weights.from_arrays(arrays, description)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert description["layers/000-001/query/kernel"] == {"format": "adapted"}
    assert description["layers/000-001/query/kernel/base"]["offset"] == 3


def test_a_format_says_how_its_pieces_follow_the_matrix():
    kernel = Adapted(rounded(0, 4, 5), jnp.ones((4, 2)), jnp.ones((2, 5)))
    specs = weights.specs(kernel, P("fsdp", "tensor"))
    assert specs.base.codes == P("fsdp", "tensor")
    assert specs.base.scale == P("tensor")
    assert specs.a == P("fsdp", None)
    assert weights.nbytes(kernel) == 4 * 5 + 5 * 4 + 4 * (8 + 10)
    assert weights.paths({"a": {"kernel": kernel}}) == ["a/kernel"]


def test_an_unregistered_format_and_an_unknown_name_are_named():
    with pytest.raises(ValueError, match=r"a/kernel.*Rounded is not in weights.FORMATS"):
        weights.to_arrays({"a": {"kernel": rounded(0, 2, 2)}})
    with pytest.raises(ValueError, match="a/kernel: unknown weight format 'roundd'"):
        weights.from_arrays({"a": {"kernel": {}}}, {"a/kernel": {"format": "roundd"}})


def test_an_input_of_another_width_is_an_error_that_shows_both():
    with pytest.raises(ValueError, match=r"5 features but the weight \(4, 3\) takes 4"):
        weights.matmul(jnp.ones((2, 5)), jnp.ones((4, 3)))


def test_ids_outside_the_vocabulary_embed_to_zero_and_the_tied_head_is_its_transpose():
    table = {"table": jnp.arange(12.0).reshape(4, 3)}
    rows = weights.embed(table, jnp.array([1, 7]), jnp.float32)
    np.testing.assert_array_equal(rows, [[3, 4, 5], [0, 0, 0]])
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(weights.unembed(table, x), x @ table["table"].T)
