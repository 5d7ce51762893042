"""The product's own derivative rule: the gradients of the automatic one, in any mode."""

from __future__ import annotations

from functools import partial

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weights


def arrays(lead, d_in, d_out):
    random = np.random.default_rng(0)
    shapes = ((*lead, d_in), (d_in, d_out), (*lead, d_out))
    return [random.standard_normal(shape) for shape in shapes]


@settings(max_examples=14, deadline=None)
@given(
    lead=st.sampled_from([(), (3,), (2, 1, 4)]),
    d_in=st.sampled_from([1, 9]),
    d_out=st.sampled_from([1, 4]),
    tied=st.booleans(),
)
def test_gradients_equal_float64(lead, d_in, d_out, tied):
    x, w, g = arrays(lead, d_in, d_out)

    def value(x, w):
        y = weights.unembed({"table": w.T}, x) if tied else weights.matmul(x, w)
        return jnp.sum(y * g.astype(np.float32))

    for_x, for_w = jax.grad(value, (0, 1))(jnp.float32(x), jnp.float32(w))
    np.testing.assert_allclose(for_x, g @ w.T, rtol=1e-5, atol=1e-5)
    rows = x.reshape(-1, d_in).T @ g.reshape(-1, d_out)
    np.testing.assert_allclose(for_w, rows, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_float32_master_is_not_rounded_to_the_type_of_the_activations():
    x = jnp.ones((301, 1), jnp.bfloat16)
    gradient = jax.grad(lambda w: weights.matmul(x, w, dtype=jnp.float32).sum())(jnp.ones((1, 2)))
    np.testing.assert_array_equal(gradient, [[301, 301]])


def test_forward_mode_and_hessian_products_go_through_and_experts_are_mapped_over():
    x, w, _ = (jnp.float32(a) for a in arrays((5,), 3, 4))

    def value(w):
        return jnp.sum(jnp.tanh(weights.matmul(x, w)) ** 2)

    def reference(w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    for of in (jax.value_and_grad, jax.grad, lambda f: f, lambda f: jax.grad(lambda w: f(w) ** 2)):
        ours, theirs = (jax.jvp(of(f), (w,), (w + 1,)) for f in (value, reference))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, theirs)
    experts = jnp.stack([w, 2 * w])
    mapped = jax.vmap(jax.grad(value))(experts)
    np.testing.assert_allclose(mapped[1], jax.grad(value)(2 * w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("policy", "kept"), [("dots_saveable", 1), ("nothing_saveable", 0)])
def test_rematerialisation_policies_see_the_product(policy, kept, capsys):
    x, w, _ = (jnp.float32(a) for a in arrays((5,), 3, 4))
    policy = getattr(jax.checkpoint_policies, policy)
    layer = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(weights.matmul(x, w))), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(layer, x, w)
    assert capsys.readouterr().out.count("[5,4]") == kept
