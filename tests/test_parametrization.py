"""Multipliers by path hold for whatever optimizer they follow; muP keeps activations flat."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import ModelConfig, abstract, hidden_states, init, mup, rules
from sharding import Rule
from training.decoders import decoder
from training.objectives import language_model
from training.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer
from training.parametrization import Multipliers, multipliers, scale_learning_rates
from training.schedules import ScheduleConfig, make_schedule
from training.state import init_state
from training.step import make_step

RULES = (
    Rule("layers/.*/kernel", ("d_model", "d_ff"), learning_rate=0.25, weight_decay=4.0),
    Rule("layers/.*", (None,), learning_rate=3.0),
    Rule("embed/table", ("vocab", "d_model")),
)
PARAMS = {
    "embed": {"table": np.full((5, 8), 0.5, np.float32)},
    "layers": {
        "000-002": {"up": {"kernel": np.full((2, 8, 6), 0.5, np.float32), "bias": np.ones((2, 6))}}
    },
}
FACTORS = {"embed/table": 1.0, "layers/000-002/up/bias": 3.0, "layers/000-002/up/kernel": 0.25}


def updates(optimizer):
    params = jax.tree.map(jnp.float32, PARAMS)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
    result, _ = optimizer.update(gradients, optimizer.init(params), params)
    leaves = jax.tree.leaves(result)
    return dict(zip(FACTORS, leaves, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_scale_the_updates_of_every_optimizer(name):
    config = OptimizerConfig(name=name, weight_decay=0.0)
    plain = updates(make_optimizer(config, PARAMS))
    ours = updates(make_optimizer(config, PARAMS, RULES))
    for path, factor in FACTORS.items():
        np.testing.assert_allclose(ours[path], factor * plain[path], rtol=1e-6)


def test_they_chain_with_an_optimizer_of_ones_own():
    table = multipliers(PARAMS, RULES)
    plain = updates(optax.adabelief(1e-2))
    ours = updates(optax.chain(optax.adabelief(1e-2), scale_learning_rates(table)))
    for path, factor in FACTORS.items():
        np.testing.assert_allclose(ours[path], factor * plain[path], rtol=1e-6)


def test_decay_moves_with_the_learning_rate_and_its_own_multiplier():
    zero = jax.tree.map(lambda p: jnp.zeros(p.shape), PARAMS)
    params = jax.tree.map(jnp.float32, PARAMS)
    for rules_, expected in ((RULES, 0.25 * 4.0), ((), 1.0)):
        optimizer = make_optimizer(OptimizerConfig(name="sgd", weight_decay=0.2), params, rules_)
        result, _ = optimizer.update(zero, optimizer.init(params), params)
        kernel = result["layers"]["000-002"]["up"]["kernel"]
        np.testing.assert_allclose(kernel, 0.2 * expected * 0.5, rtol=1e-6)


def test_config_multipliers_come_on_top_and_must_match():
    table = multipliers(PARAMS, RULES, ((".*kernel", 2.0), ("layers/.*", 10.0)))
    assert table["layers/000-002/up/kernel"] == Multipliers(5.0, 4.0)
    assert table["embed/table"] == Multipliers()
    config = OptimizerConfig(learning_rates=(("embedd/.*", 2.0),))
    with pytest.raises(ValueError, match=r"optimizer.learning_rates: the pattern 'embedd/\.\*'"):
        make_optimizer(config, PARAMS)


@pytest.mark.parametrize("wide", [True, False])
def test_a_rule_holds_for_the_arrays_inside_a_weight(wide):
    inside = {"embed": {"table": {"a": np.ones((5, 2)), "b": np.ones((2, 8))}}}
    rules_ = (Rule("embed/table" if wide else "embed/table/b", (None, None), learning_rate=7.0),)
    found = {path: m.learning_rate for path, m in multipliers(inside, rules_).items()}
    assert found == {"embed/table/a": 7.0 if wide else 1.0, "embed/table/b": 7.0}


def growth(parametrized: bool, widths=(32, 96, 288), steps=3) -> float:
    """Slope over log width of log mean |change of the last hidden state| after a few steps."""
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    sizes = []
    for width in widths:
        config = ModelConfig(
            vocab_size=64, d_model=width, num_layers=1, num_heads=4, d_ff=2 * width, init_std=0.1
        )
        config = mup(config, 32, base_head_dim=8) if parametrized else config
        before, after = hidden_before_and_after(config, batch, steps)
        sizes.append(float(np.mean(np.abs(after - before))))
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def hidden_before_and_after(config, batch, steps):
    """The residual stream before the final norm (which would hide its growth), and after steps."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0), abstract(config), rules(config))
    state = init_state(partial(init, config), optimizer, jax.random.key(0))
    schedule = make_schedule(ScheduleConfig(name="constant", warmup=0), 0.01, steps)
    step = make_step(language_model(), decoder(config), optimizer, schedule)

    @jax.jit
    def read(params):
        site = "layers/0/hidden"
        return hidden_states(params, batch["tokens"], config, taps=(site,))[1]["taps"][site]

    before = np.asarray(read(state.params))
    for _ in range(steps):
        state, _ = step(state, batch)
    return before, np.asarray(read(state.params))


@pytest.mark.slow
def test_activations_change_alike_over_widths_with_mup_and_grow_without():
    assert abs(growth(True)) < 0.1
    assert growth(False) > 0.3
