"""Pipelines whose stages hold unequal numbers of layers: the split, and the step of one device."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import MIXTURE, _config, _frozen_norms, _objective, _staged
from test_sharded_step import _batches, _layout, fast_compile
from tiny import tiny_config, write_text

from model import abstract, init, rules
from model.checkpoint import load
from planning.stages import slowest, split_layers
from sharding import PipelineConfig, check_stage_layers, partition
from sharding.stage_layers import moves
from training import train_language_model
from training.decoders import decoder
from training.staged import staged_gradients
from training.step import batch_gradients, micro_batches
from training.trainable import merge, split_trainable
from weights import flatten

__all__ = ["fast_compile"]

pytestmark = pytest.mark.usefixtures("fast_compile")

SPEEDS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SPEEDS, st.integers(4, 14), st.data())
def test_no_split_has_a_faster_slowest_stage(speeds, layers, data):
    extra = data.draw(
        st.lists(st.floats(0, 4), min_size=len(speeds), max_size=len(speeds)), "extra"
    )
    found = split_layers(layers, speeds, extra)
    assert sum(found) == layers
    assert min(found) >= 1
    every = itertools.product(range(1, layers + 1), repeat=len(speeds))
    best = min(slowest(split, speeds, extra) for split in every if sum(split) == layers)
    assert slowest(found, speeds, extra) == pytest.approx(best, rel=1e-12)


def test_splits_are_those_of_holmes_scripts_and_equal_for_equal_speeds():
    assert split_layers(48, (1.18, 1)) == (26, 22)
    assert split_layers(30, (1.14, 1)) == (16, 14)
    assert split_layers(24, (3.0,) * 4) == (6, 6, 6, 6)
    assert split_layers(5, (1, 1)) == (3, 2)
    assert split_layers(8, (1, 1), extra=(0, 2)) == (5, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3, (1, 1, 1, 1)), "3 layers for 4 stages"),
        ((3, (1, 0)), "stage 1: speed 0"),
        ((3, (1, 1), (1,)), "1 values of extra work for 2 stages"),
    ],
)
def test_splits_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        split_layers(*arguments)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_every_layer_reaches_the_stage_that_runs_it(stages, part, data):
    cuts = data.draw(st.permutations(range(1, stages * part)))[: stages - 1]
    layers = np.diff([0, *sorted(cuts), stages * part]).tolist()
    held = [[None] * max(layers) for _ in layers]
    for move in moves(layers):
        for stage, count in enumerate(move.counts):
            for row in range(count):
                sender = stage - move.by
                layer = sender * part + move.starts[sender] + row
                assert row + move.starts[sender] < part
                held[stage][move.slots[stage] + row] = layer
    found = [[layer for layer in stage if layer is not None] for stage in held]
    assert [len(stage) for stage in found] == layers
    assert list(itertools.chain(*found)) == list(range(stages * part))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": (3, 0)}, r"layers=\(3, 0\): each stage needs at least one layer"),
        ({"outside": "repeat"}, "nearest: .*repeated"),
        ({"layers": (3, 5), "schedule": "interleaved", "repeats": 2}, "one chunk a stage"),
    ],
)
def test_settings_that_contradict_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        PipelineConfig(**fields)


def test_layers_that_do_not_fit_the_model_or_the_mesh_are_named():
    with pytest.raises(ValueError, match=r"3 stages, mesh.stage is 2"):
        check_stage_layers((3, 3, 2), 8, 2)
    with pytest.raises(ValueError, match=r"9 layers in all, the model has 8"):
        check_stage_layers((4, 5), 8, 2)


@pytest.mark.slow
def test_loss_metrics_and_gradients_are_those_of_one_device():
    config = _config(num_layers=8, **MIXTURE)
    layout = _layout(config, stage=2, expert=2, tensor=2)
    step = _staged(config, layout, ("gpipe", 1, (3, 5)), 4)
    whole = init(config, jax.random.key(0))
    ours, others = split_trainable(whole, _frozen_norms)
    objective = _objective(config)
    cut, key = micro_batches(next(_batches()), 4), jax.random.key(1)

    def alone(ours, others, cut):
        apply = lambda params, batch, rng: decoder(config)(merge(params, others), batch, rng)  # noqa: E731
        return batch_gradients(objective, apply, ours, cut, key)

    expected, expected_metrics = jax.jit(alone)(ours, others, cut)
    params = jax.device_put(whole, partition(abstract(config), rules(config), layout))
    parts = split_trainable(params, _frozen_norms)
    cut = jax.device_put(cut, layout.sharding((None, "batch", "length")))
    gradients = jax.jit(
        lambda ours, others, cut: staged_gradients(step, objective, ours, others, cut, key)
    )
    compiled = gradients.lower(*parts, cut).compile()
    assert " conditional(" in compiled.as_text()  # a short stage skips what it has not
    found, metrics = compiled(*parts, cut)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_a_run_over_unequal_stages_leaves_a_checkpoint_like_any_other(tmp_path):
    fields = {"train__accumulation": 2, "model__num_layers": 4, "mesh__stage": 2}
    text = write_text(tmp_path / "text")
    config = tiny_config(text, train__steps=2, train__pipeline__layers=(3, 1), **fields)
    result = train_language_model(config, tmp_path / "run", quiet=True)
    assert result.finished
    found = flatten(load(tmp_path / "run").params)
    assert {path: x.shape for path, x in found.items()} == {
        path: x.shape for path, x in flatten(abstract(config.model)).items()
    }
    assert all(np.isfinite(x).all() for x in found.values())
