"""Each optimizer against its paper's formula in float64, or torch; stacked layers as if apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.muon import orthogonalise, scale_by_muon
from training.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer

RATE, STEPS = 0.05, 20
KERNEL, BIAS, TABLE = (
    "layers/000-003/attention/query/kernel",
    "layers/000-003/norm/scale",
    "embed/table",
)


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def random_tree(rng, rows=6, columns=4):
    shapes = {KERNEL: (3, rows, columns), BIAS: (3, columns), TABLE: (5, columns)}
    return nested(
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    )


def run(config, params, gradients):
    """Parameters after one step for each of the gradient trees."""
    params = jax.tree.map(jnp.asarray, params)
    optimizer = make_optimizer(config, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p - RATE * u, params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return jax.tree.map(np.asarray, params)


def problem(seed=0, **sizes):
    rng = np.random.default_rng(seed)
    return random_tree(rng, **sizes), [random_tree(rng, **sizes) for _ in range(STEPS)]


def one(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def adam_moments(history, b1, b2):
    m = v = 0.0
    for t, g in enumerate(history, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield m / (1 - b1**t), v / (1 - b2**t)


def lamb_float64(x, history, decay):
    """LAMB on one matrix (You et al., algorithm 2), beta 0.9 and 0.999, eps 1e-6."""
    x = x.astype(np.float64)
    for m, v in adam_moments([g.astype(np.float64) for g in history], 0.9, 0.999):
        r = m / (np.sqrt(v) + 1e-6) + decay * x
        ratio = np.linalg.norm(x) / np.linalg.norm(r) if x.ndim == 2 else 1.0
        x = x - RATE * ratio * r
    return x


def lion_float64(x, history, decay):
    """Lion (Chen et al., algorithm 2), beta 0.9 and 0.99."""
    x, m = x.astype(np.float64), np.zeros(x.shape)
    for g in history:
        x = x - RATE * (np.sign(0.9 * m + 0.1 * g) + decay * x)
        m = 0.99 * m + 0.01 * g
    return x


@pytest.mark.parametrize(("name", "reference"), [("lamb", lamb_float64), ("lion", lion_float64)])
def test_layerwise_reference_in_float64(name, reference):
    params, gradients = problem()
    got = run(OptimizerConfig(name=name, weight_decay=0.1), params, gradients)
    for path in (KERNEL, BIAS):
        for layer in range(3):
            history = [one(g, path)[layer] for g in gradients]
            decay = 0.1 if path == KERNEL else 0.0
            expected = reference(one(params, path)[layer], history, decay)
            np.testing.assert_allclose(one(got, path)[layer], expected, rtol=2e-5, atol=2e-6)
    history = [one(g, TABLE) for g in gradients]
    expected = reference(one(params, TABLE), history, 0.1)
    np.testing.assert_allclose(one(got, TABLE), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_does_not_depend_on_how_layers_are_stacked(name):
    params, gradients = problem(rows=136, columns=130)
    gradients = gradients[:4]

    def apart(tree):
        layers = {
            f"layers/{i:03}-{i + 1:03}/attention/query/kernel": one(tree, KERNEL)[i : i + 1]
            for i in range(3)
        }
        return nested({**layers, TABLE: one(tree, TABLE)})

    config = OptimizerConfig(name=name)
    whole = run(config, params, gradients)
    split = run(config, apart(params), [apart(g) for g in gradients])
    for i in range(3):
        ours = one(split, f"layers/{i:03}-{i + 1:03}/attention/query/kernel")[0]
        np.testing.assert_allclose(one(whole, KERNEL)[i], ours, rtol=1e-5, atol=1e-6)


def test_lamb_leaves_a_zero_matrix_with_ratio_one():
    params, gradients = problem()
    one(params, TABLE)[:] = 0
    got = run(OptimizerConfig(name="lamb", weight_decay=0), params, gradients[:1])
    np.testing.assert_allclose(np.abs(one(got, TABLE)), RATE, rtol=1e-3)


def test_adafactor_is_optax_on_one_matrix():
    rng = np.random.default_rng(3)
    params = {"head": {"kernel": rng.normal(size=(140, 150)).astype(np.float32)}}
    gradients = [
        {"head": {"kernel": rng.normal(size=(140, 150)).astype(np.float32)}} for _ in range(5)
    ]
    got = run(OptimizerConfig(name="adafactor", weight_decay=0), params, gradients)
    reference = optax.adafactor(RATE)
    state = reference.init(params)
    for gradient in gradients:
        updates, state = reference.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        got["head"]["kernel"], params["head"]["kernel"], rtol=1e-5, atol=1e-6
    )


def test_adafactor_stores_rows_and_columns_only():
    params = {"head": {"kernel": jnp.zeros((256, 512))}}
    state = make_optimizer(OptimizerConfig(name="adafactor"), params).init(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < 4 * (256 + 512) + 64


@pytest.mark.parametrize("shape", [(8, 8), (3, 16, 6), (2, 2, 5, 12)])
def test_orthogonalise_keeps_singular_vectors_and_evens_the_values(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    rotated = (
        np.swapaxes(u, -1, -2) @ np.asarray(orthogonalise(jnp.asarray(x))) @ np.swapaxes(vt, -1, -2)
    )
    values = np.diagonal(rotated, axis1=-2, axis2=-1)
    assert np.all((values > 0.5) & (values < 1.3))
    off_diagonal = rotated - values[..., None] * np.eye(values.shape[-1])
    assert np.abs(off_diagonal).max() < 1e-3


def muon_float64(x, history, decay):
    """Jordan's Muon with Nesterov momentum and Moonlight's scale, on one matrix."""
    x, m = x.astype(np.float64), np.zeros(x.shape)
    for g in history:
        m = 0.95 * m + 0.05 * g
        y = 0.95 * m + 0.05 * g
        y = y.T if y.shape[0] > y.shape[1] else y
        y = y / np.linalg.norm(y)
        for _ in range(5):
            gram = y @ y.T
            y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
        y = y.T if x.shape[0] > x.shape[1] else y
        x = x - RATE * (0.2 * np.sqrt(max(x.shape)) * y + decay * x)
    return x


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    params, gradients = problem()
    got = run(OptimizerConfig(name="muon"), params, gradients)
    for layer in range(3):
        history = [one(g, KERNEL)[layer] for g in gradients]
        expected = muon_float64(one(params, KERNEL)[layer], history, 0.1)
        np.testing.assert_allclose(one(got, KERNEL)[layer], expected, rtol=1e-3, atol=1e-4)
    adamw = run(OptimizerConfig(name="adamw"), params, gradients)
    for path in (BIAS, TABLE):
        np.testing.assert_array_equal(one(got, path), one(adamw, path))


def test_muon_update_has_the_size_asked_for():
    gradient = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)}
    transform = scale_by_muon(update_rms=0.2)
    updates, _ = transform.update(gradient, transform.init(gradient))
    assert float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2))) == pytest.approx(0.2, rel=0.2)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_equals_torch(name):
    torch = pytest.importorskip("torch")
    params, gradients = problem()
    weight = torch.nn.Parameter(torch.tensor(one(params, KERNEL).copy()))
    if name == "adamw":
        peer = torch.optim.AdamW([weight], lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    else:
        peer = torch.optim.SGD([weight], lr=RATE, momentum=0.9, nesterov=True)
    for gradient in gradients:
        weight.grad = torch.tensor(one(gradient, KERNEL))
        peer.step()
    decay = 0.1 if name == "adamw" else 0.0
    got = run(OptimizerConfig(name=name, weight_decay=decay), params, gradients)
    np.testing.assert_allclose(one(got, KERNEL), weight.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "shrinks"),
    [(None, {KERNEL, TABLE}), ((".*kernel",), {KERNEL}), ((".*",), {KERNEL, TABLE, BIAS})],
)
def test_decay_reaches_matrices_unless_patterns_say_otherwise(decay, shrinks):
    params, _ = problem()
    still = jax.tree.map(np.zeros_like, params)
    got = run(OptimizerConfig(name="sgd", weight_decay=0.5, decay=decay), params, [still])
    for path in (KERNEL, TABLE, BIAS):
        factor = 1 - RATE * 0.5 if path in shrinks else 1
        np.testing.assert_allclose(one(got, path), factor * one(params, path), rtol=1e-6)


def test_moments_can_be_stored_in_bfloat16():
    params, gradients = problem()
    for name in ("adamw", "lion", "muon", "sgd"):
        optimizer = make_optimizer(OptimizerConfig(name=name, moment_dtype="bfloat16"), params)
        _, state = optimizer.update(gradients[0], optimizer.init(params), params)
        assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(state)}, name


@pytest.mark.parametrize("field", ["decay", "matrices"])
def test_a_pattern_that_matches_nothing_is_an_error(field):
    config = OptimizerConfig(name="muon", **{field: ("layers/.*/kernal",)})
    with pytest.raises(ValueError, match=rf"optimizer\.{field}.*kernal.*matches no parameter"):
        make_optimizer(config, problem()[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adam"}, "nearest: adamw"),
        ({"b1": 1.0}, r"optimizer.b1 is 1.0: it must lie in \[0, 1\)"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate is -1.0"),
        ({"moment_dtype": "int8"}, "give float32 or bfloat16"),
    ],
)
def test_wrong_settings_name_the_field(fields, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**fields)
