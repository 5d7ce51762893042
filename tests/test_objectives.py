"""Losses and their gradients against float64 NumPy and torch; masked and sharded alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sharding import MeshConfig, make_mesh
from training.cross_entropy import token_cross_entropy
from training.objectives import (
    OBJECTIVES,
    classification,
    count_targets,
    language_model,
    three_functions,
)

WHOLE = PartitionSpec()


def draw(batch, length, vocab, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(batch, length, vocab))).astype(np.float32)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    return logits, targets, (rng.random((batch, length)) < 0.6).astype(np.float32)


def softmax64(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def fixed(logits, aux=None):
    """An apply whose logits are its parameters."""
    return lambda params, batch, rng: (params, aux or {})


@settings(deadline=None, max_examples=8)
@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(2, 30), st.sampled_from([1e-3, 3.0, 300.0])
)
def test_cross_entropy_in_float64(batch, length, vocab, scale):
    logits, targets, _ = draw(batch, length, vocab, scale=scale)
    entropy = token_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    wide = logits.astype(np.float64)
    log_z = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    chosen = np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(entropy.loss, log_z - chosen, rtol=1e-5, atol=1e-5 * max(scale, 1))
    np.testing.assert_array_equal(entropy.correct > 0, wide.argmax(-1) == targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_softmax_minus_target(smoothing, dtype):
    logits, targets, mask = draw(3, 5, 11)
    logits = np.asarray(jnp.asarray(logits, dtype).astype(jnp.float32))
    objective = language_model(z_loss=1e-2, label_smoothing=smoothing)
    batch = {"targets": targets, "loss_mask": mask}
    gradient = jax.grad(lambda p: objective.loss(fixed(p), p, batch, None)[0])(
        jnp.asarray(logits, dtype)
    )
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    onehot = np.eye(11)[targets] * (1 - smoothing) + smoothing / 11
    expected = softmax64(logits) * (1 + 2e-2 * log_z) - onehot
    expected = expected * mask[..., None] / mask.sum()
    assert gradient.dtype == dtype
    rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(gradient.astype(np.float32), expected, rtol=rounding, atol=1e-6)


@pytest.mark.interop
def test_equals_torch_with_label_smoothing():
    torch = pytest.importorskip("torch")
    logits, targets, _ = draw(4, 7, 23)
    ours = token_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), 0.2).loss
    peer = torch.nn.functional.cross_entropy(
        torch.tensor(logits).flatten(0, 1),
        torch.tensor(targets).long().flatten(),
        label_smoothing=0.2,
        reduction="none",
    )
    np.testing.assert_allclose(np.ravel(ours), peer.numpy(), rtol=1e-5, atol=1e-6)


def test_masked_targets_have_no_influence_even_where_logits_are_not_finite():
    logits, targets, mask = draw(2, 4, 9)
    mask[0, 1] = 0
    spoiled = logits.copy()
    spoiled[0, 1] = np.nan
    batch = {"targets": targets, "loss_mask": mask}

    def loss(x):
        return language_model().loss(fixed(x), x, batch, None)

    np.testing.assert_allclose(
        loss(jnp.asarray(spoiled))[0], loss(jnp.asarray(logits))[0], rtol=1e-6
    )
    nothing = {"targets": targets, "loss_mask": 0 * mask}
    value, metrics = language_model().loss(fixed(logits), jnp.asarray(logits), nothing, None)
    assert float(value) == 0
    assert float(count_targets(nothing)) == 0
    assert all(np.isfinite(float(metric)) for metric in metrics.values())


def test_a_head_of_zeros_is_right_once_in_vocab():
    entropy = token_cross_entropy(jnp.zeros((2, 3, 10)), jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_allclose(entropy.correct, 0.1, rtol=1e-6)
    np.testing.assert_allclose(entropy.loss, np.log(10), rtol=1e-6)


def test_reported_loss_is_cross_entropy_alone():
    logits, targets, mask = draw(2, 4, 9)
    batch = {"targets": targets, "loss_mask": mask}
    plain = language_model().loss(fixed(logits), jnp.asarray(logits), batch, None)
    heavy = language_model(z_loss=0.5, auxiliary=(("router_balance", 2.0),)).loss(
        fixed(logits, {"router_balance": jnp.array([1.0, 2.0])}), jnp.asarray(logits), batch, None
    )
    assert float(heavy[1]["loss"]) == float(plain[1]["loss"])
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    expected = float(plain[0]) + 0.5 * (log_z**2 * mask).sum() / mask.sum() + 2.0 * 3.0
    assert float(heavy[0]) == pytest.approx(expected, rel=1e-5)
    assert float(heavy[1]["router_balance"]) == 3.0


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def summed_loss(logits, targets):
    return token_cross_entropy(logits, targets).loss.sum()


def test_no_copy_of_the_logits_is_made():
    logits = jax.ShapeDtypeStruct((4, 64, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    assert temporary_bytes(jax.grad(summed_loss), logits, targets) < logits.size // 2


def test_forward_mode_gives_the_same_derivative():
    logits, targets, _ = draw(2, 3, 7)
    direction, _, _ = draw(2, 3, 7, seed=1)
    function = partial(summed_loss, targets=jnp.asarray(targets))
    _, forward = jax.jvp(function, (jnp.asarray(logits),), (jnp.asarray(direction),))
    expected = ((softmax64(logits) - np.eye(7)[targets]) * direction).sum()
    assert float(forward) == pytest.approx(expected, rel=1e-4)


def test_a_sharded_vocabulary_is_not_gathered():
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    split = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    logits, targets, _ = draw(2, 4, 64)
    gradient = jax.grad(summed_loss)
    sharded = jax.jit(gradient, out_shardings=split)
    placed = (jax.device_put(logits, split), jax.device_put(targets, NamedSharding(mesh, WHOLE)))
    assert "all-gather" not in sharded.lower(*placed).compile().as_text()
    expected = gradient(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(sharded(*placed), expected, rtol=1e-5, atol=1e-6)


def test_classification_weighs_examples():
    logits, labels, mask = draw(6, 1, 4)
    logits, batch = logits[:, 0], {"labels": labels[:, 0], "loss_mask": mask[:, 0]}
    loss, metrics = classification().loss(fixed(logits), jnp.asarray(logits), batch, None)
    per_example = -np.log(softmax64(logits)[np.arange(6), labels[:, 0]])
    expected = (per_example * mask[:, 0]).sum() / mask.sum()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    predicted = classification().predict(fixed(logits), jnp.asarray(logits), batch, None)
    np.testing.assert_allclose(predicted, softmax64(logits), rtol=1e-5)
    assert set(metrics) == {"loss", "accuracy"}


def test_prediction_of_a_language_model():
    logits, targets, mask = draw(2, 4, 9)
    batch = {"targets": targets, "loss_mask": mask}
    predicted = OBJECTIVES["language_model"]().predict(
        fixed(logits), jnp.asarray(logits), batch, None
    )
    np.testing.assert_array_equal(predicted["token"], logits.argmax(-1))
    chosen = np.take_along_axis(softmax64(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(predicted["log_probability"], np.log(chosen), rtol=1e-4, atol=1e-5)


def test_three_functions_weigh_rows():
    objective = three_functions(
        batch=lambda rows: {"x": np.asarray(rows)}, loss=lambda apply, p, b, rng: (p, {})
    )
    assert float(objective.weight(objective.batch([1.0, 2.0, 3.0]))) == 3
    assert objective.loss(None, 4.0, {}, None, frozen=None)[0] == 4.0


def test_an_auxiliary_loss_that_the_model_does_not_give_is_named():
    logits, targets, _ = draw(1, 2, 3)
    objective = language_model(auxiliary=(("balance", 1.0),))
    with pytest.raises(ValueError, match="'balance', which the model does not give; it gives load"):
        objective.loss(
            fixed(logits, {"load": 1.0}), jnp.asarray(logits), {"targets": targets}, None
        )
