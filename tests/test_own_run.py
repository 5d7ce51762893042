"""A run that is no language model's: three functions and any Flax module, on any mesh."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import MeshConfig, Rule, ShardingConfig, make_layout, make_mesh
from training import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    from_functions,
    train,
)
from training.setup import prepare


class Regressor(nn.Module):
    """A curve through points; its input and output have odd sizes on purpose."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(32, name="hidden")(x))
        return nn.Dense(1, name="out")(x)[:, 0]


def init(key):
    return Regressor().init(key, jnp.zeros((1, 3)))["params"]


def apply(params, batch, rng):
    return Regressor().apply({"params": params}, batch["x"]), {}


def batch(step):
    x = np.random.default_rng([0, step]).uniform(-1, 1, (16, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(3 * x).sum(axis=1)}


def loss(apply, params, batch, rng):
    error = apply(params, batch, rng)[0] - batch["y"]
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


def predict(apply, params, batch, rng):
    return apply(params, batch, rng)[0]


TASK = from_functions(init, apply, batch, loss, predict, validation=lambda: [batch(10**6)])
CONFIG = RunConfig(
    name="own",
    train=TrainConfig(steps=8),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    checkpoint=CheckpointConfig(every=4),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one device."""
    layout = make_layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    return train(TASK, CONFIG, tmp_path_factory.mktemp("alone"), layout=layout, quiet=True)


def test_it_learns_and_predicts(alone):
    assert alone.evaluation["tokens"] == 16
    start = train_loss(init(jax.random.key(0)))
    assert alone.evaluation["loss"] < start
    points = batch(10**6)
    guessed = TASK.objective.predict(TASK.apply, alone.state.params, points, None)
    assert guessed.shape == (16,)
    assert float(jnp.mean((guessed - points["y"]) ** 2)) == pytest.approx(alone.evaluation["loss"])


def train_loss(params):
    return float(loss(apply, params, batch(10**6), None)[0])


@pytest.mark.parametrize(
    "mesh", [MeshConfig(tensor=2), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=4)]
)
def test_a_mesh_with_derived_rules_trains_the_same_model(alone, tmp_path, mesh):
    result = train(TASK, dataclasses.replace(CONFIG, mesh=mesh), tmp_path / "run", quiet=True)
    kernel = result.state.params["hidden"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (mesh.tensor == 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        jax.device_get(result.state.params),
        jax.device_get(alone.state.params),
    )


def test_stopped_and_resumed_it_is_the_same_to_the_bit(alone, tmp_path):
    layout = make_layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    first = train(TASK, CONFIG, tmp_path / "run", layout=layout, stop_at=5, quiet=True)
    assert not first.finished
    again = train(TASK, CONFIG, tmp_path / "run", layout=layout, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, again.state, alone.state)


def test_extra_rules_of_the_config_change_where_an_array_lies():
    extra = ShardingConfig(extra_rules=((r"hidden/kernel", (None, None)),))
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(tensor=8), sharding=extra)
    functions = prepare(TASK, config, make_layout(make_mesh(config.mesh), extra))
    params = functions.placement.state.params
    assert params["hidden"]["kernel"].spec == jax.P(None, None)
    assert params["hidden"]["bias"].spec == jax.P("tensor")

    wrong = dataclasses.replace(extra, extra_rules=((r"hiden/kernel", (None, None)),))
    with pytest.raises(ValueError, match=r"hiden/kernel.*nearest paths: hidden/kernel"):
        prepare(TASK, dataclasses.replace(config, sharding=wrong), functions.layout)


def test_multipliers_of_a_models_rules_hold_where_its_placement_is_derived():
    rules = (Rule("hidden/.*", (), learning_rate=0.0), Rule(".*", ()))
    task = dataclasses.replace(TASK, rules=rules)
    config = dataclasses.replace(CONFIG, sharding=ShardingConfig(rules="auto"))
    functions = prepare(task, config, make_layout(make_mesh(MeshConfig())))
    start = jax.device_get(functions.create().params)
    state, _ = functions.step(functions.create(), functions.put(batch(0)))
    state, _ = functions.step(state, functions.put(batch(1)))
    np.testing.assert_array_equal(state.params["hidden"]["kernel"], start["hidden"]["kernel"])
    assert not np.array_equal(state.params["out"]["kernel"], start["out"]["kernel"])


def test_frozen_references_reach_the_users_loss(tmp_path):
    teacher = init(jax.random.key(7))

    def imitate(apply, params, batch, rng, frozen):
        error = apply(params, batch, rng)[0] - apply(frozen, batch, rng)[0]
        return jnp.mean(error**2), {}

    task = from_functions(
        init, apply, batch, imitate, validation=lambda: [batch(10**6)], frozen=teacher
    )
    result = train(task, CONFIG, tmp_path / "run", quiet=True)
    start = imitate(apply, init(jax.random.key(0)), batch(10**6), None, frozen=teacher)[0]
    assert result.evaluation["loss"] < float(start)


def test_a_batch_of_unequal_rows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"same first axis.*'y': \(3,\)"):
        from_functions(init, apply, lambda step: {"x": np.ones(4), "y": np.ones(3)}, loss)
