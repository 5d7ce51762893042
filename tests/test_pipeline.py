"""A step over pipeline stages is the step of one device: loss, metrics, gradients, parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharded_step import _batches, _gathered_shapes, _layout, fast_compile
from tiny import tiny_config, write_text

from model import ModelConfig, Runtime, abstract, init, rules
from model.checkpoint import load
from sharding import PipelineConfig, partition, pipeline_schedule
from training import train_language_model
from training.decoders import decoder, staged_decoder
from training.objectives import language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.schedules import ScheduleConfig, make_schedule
from training.staged import StagedStep, staged_gradients
from training.state import abstract_state, init_state, place
from training.step import batch_gradients, make_step, micro_batches
from training.trainable import merge, split_trainable
from weights import flatten

__all__ = ["fast_compile"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compile")]

PLAIN = {"dropout": 0.1, "tied_embeddings": True}
MIXTURE = {
    "feed_forward": "experts",
    "num_experts": 4,
    "expert_d_ff": 24,
    "capacity_factor": 1.0,
}
AUXILIARY = (("load_balance", 0.1), ("router_z", 0.01))


def _config(**fields):
    sizes = {"vocab_size": 160, "d_model": 32, "num_layers": 4, "num_heads": 4, "kv_heads": 2}
    return ModelConfig(**{**sizes, "d_ff": 48, "init_std": 0.1, "max_length": 32, **fields})


def _objective(config):
    mixture = config.feed_forward == "experts"
    return language_model(
        z_loss=1e-3,
        auxiliary=AUXILIARY if mixture else (),
        report=("dropped", "expert_load") if mixture else (),
    )


def _staged(config, layout, schedule, micro, remat="none"):
    stages = layout.mesh.shape["stage"]
    runtime = Runtime(layout=layout, remat=remat)
    settings = PipelineConfig(*schedule)
    order = pipeline_schedule(settings, stages, micro)
    repeated = settings.outside == "repeated"
    return StagedStep(staged_decoder(config, runtime), order, layout, settings.layers, repeated)


def _frozen_norms(path):
    return "norm" not in path


@functools.cache
def _alone(config, micro):
    ours, others = split_trainable(init(config, jax.random.key(0)), _frozen_norms)

    def gradients(batch):
        apply = lambda params, batch, rng: decoder(config)(merge(params, others), batch, rng)  # noqa: E731
        cut = micro_batches(batch, micro)
        return batch_gradients(_objective(config), apply, ours, cut, jax.random.key(1))

    return jax.tree.map(np.asarray, jax.jit(gradients)(next(_batches())))


CASES = {
    "gpipe-4": (PLAIN, ("gpipe",), {"stage": 4, "data": 2}, 4),
    "gpipe-fsdp-tensor": (PLAIN, ("gpipe",), {"stage": 2, "fsdp": 2, "tensor": 2}, 4),
    "gpipe-repeated": (PLAIN, ("gpipe", 1, (), "repeated"), {"stage": 4, "data": 2}, 4),
    "gpipe-mixture": (MIXTURE, ("gpipe",), {"stage": 2, "expert": 2, "tensor": 2}, 4),
    "interleaved": (PLAIN, ("interleaved", 2), {"stage": 2, "context": 2, "fsdp": 2}, 4),
    "1f1b-4": (PLAIN, ("1f1b",), {"stage": 4, "tensor": 2}, 8),
    "1f1b-fsdp-tensor": (PLAIN, ("1f1b",), {"stage": 2, "fsdp": 2, "tensor": 2}, 4),
    "1f1b-unequal-repeated": (
        PLAIN,
        ("1f1b", 1, (1, 3), "repeated"),
        {"stage": 2, "data": 2, "tensor": 2},
        4,
    ),
    "1f1b-mixture": (MIXTURE, ("1f1b",), {"stage": 2, "expert": 2, "data": 2}, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_are_those_of_one_device(case):
    fields, schedule, mesh, micro = CASES[case]
    config = _config(**fields)
    layout = _layout(config, **mesh)
    step = _staged(config, layout, schedule, micro, "dots" if "tensor" in mesh else "none")
    params = init(config, jax.random.key(0))
    params = jax.device_put(params, partition(abstract(config), rules(config), layout))
    ours, others = split_trainable(params, _frozen_norms)

    def gradients(ours, others, batch):
        cut = micro_batches(batch, micro)
        return staged_gradients(step, _objective(config), ours, others, cut, jax.random.key(1))

    batch = jax.device_put(next(_batches()), layout.sharding(("batch", "length")))
    found, metrics = jax.jit(gradients)(ours, others, batch)
    expected, expected_metrics = _alone(config, micro)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5, err_msg=path)


def _train(config, micro, layout=None, schedule=("gpipe",)):
    params = abstract(config)
    settings = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    optimizer = make_optimizer(settings, params, rules(config))
    placement = staged = None
    if layout is not None:
        placement = place(abstract_state(params, optimizer), rules(config), layout)
        staged = _staged(config, layout, schedule, micro)
    step = make_step(
        _objective(config),
        decoder(config),
        optimizer,
        make_schedule(ScheduleConfig("constant", warmup=0), 1e-2, 3),
        accumulation=micro,
        clip_norm=1.0,
        placement=placement,
        staged=staged,
    )
    make = functools.partial(init, config)
    state = init_state(make, optimizer, jax.random.key(0), placement=placement)
    losses = []
    for batch in _batches():
        if layout is not None:
            batch = jax.device_put(batch, layout.sharding(("batch", "length")))
        state, metrics = step(state, batch)
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "tokens")])
    return np.asarray(losses), state.params


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_parameters_after_three_steps_are_those_of_one_device(schedule):
    config = _config(**PLAIN)
    layout = _layout(config, stage=2, fsdp=2, tensor=2)
    losses, params = _train(config, 4, layout, (schedule,))
    expected, of_one = _three_steps(config)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    (stack,) = params["layers"].values()
    assert stack["attention"]["query"]["kernel"].sharding.spec == jax.P("stage", "fsdp", "tensor")
    for path, value in flatten(of_one).items():
        np.testing.assert_allclose(flatten(params)[path], value, rtol=0, atol=2e-5, err_msg=path)


@functools.cache
def _three_steps(config):
    losses, params = _train(config, 4)
    return losses, jax.tree.map(np.asarray, params)


WIDE = _config(d_model=64, d_ff=128)


def _compiled(schedule, micro):
    config = WIDE
    layout = _layout(config, stage=4, data=2)
    step = _staged(config, layout, (schedule,), micro, "full")
    shardings = partition(abstract(config), rules(config), layout)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        abstract(config),
        shardings,
    )
    where = layout.sharding((None, "batch", "length"))
    batch = {
        name: jax.ShapeDtypeStruct((micro, 2, 32), kind, sharding=where)
        for name, kind in (("tokens", jnp.int32), ("targets", jnp.int32))
    }
    others = jax.tree.map(lambda x: None, params)
    gradients = lambda params, batch: staged_gradients(  # noqa: E731
        step, language_model(), params, others, batch, jax.random.key(0)
    )
    return jax.jit(gradients).lower(params, batch).compile()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_messages_are_passed_on_and_no_stack_of_layers_is_gathered(schedule):
    text = _compiled(schedule, 16).as_text()
    assert "collective-permute" in text
    gathered = {tuple(sorted(shape)) for shape in _gathered_shapes(text)}
    layers = jax.tree.leaves(abstract(WIDE)["layers"])
    stacks = {tuple(sorted(x.shape)) for x in layers if x.ndim == 3}
    assert not gathered & stacks


def test_memory_of_1f1b_does_not_grow_with_the_number_of_micro_batches():
    def grown(schedule):
        few, many = (
            _compiled(schedule, micro).memory_analysis().temp_size_in_bytes for micro in (16, 64)
        )
        return many - few

    of_gpipe = grown("gpipe")
    one_input = 32 * 64 * 4
    # GPipe keeps at least the input of each of its further ticks.
    assert of_gpipe > 48 * one_input
    assert grown("1f1b") < of_gpipe / 10


def test_an_objective_may_only_hand_its_params_to_the_model():
    config = _config()
    layout = _layout(config, stage=2, data=4)
    step = _staged(config, layout, ("gpipe",), 4)
    params = init(config, jax.random.key(0))
    others = jax.tree.map(lambda x: None, params)
    cut = micro_batches(next(_batches()), 4)
    objective = language_model()

    def twice(apply, given, batch, rng, frozen=None):
        return objective.loss(apply, params, batch, rng)

    other = type(objective)(loss=twice)
    with pytest.raises(ValueError, match=r"runs the model on other params .* mesh.stage=1"):
        staged_gradients(step, other, params, others, cut, jax.random.key(0))


def test_a_run_over_stages_leaves_the_checkpoint_of_one_without(tmp_path):
    text = write_text(tmp_path / "text")
    plain = tiny_config(text, mesh__tensor=2, train__accumulation=2)
    one = train_language_model(plain, tmp_path / "one", quiet=True)
    fields = {"mesh__stage": 2, "train__pipeline__schedule": "1f1b"}
    config = tiny_config(text, train__accumulation=2, **fields)
    staged = train_language_model(config, tmp_path / "staged", quiet=True)
    assert staged.evaluation["loss"] == pytest.approx(one.evaluation["loss"], rel=1e-4)
    found = flatten(load(tmp_path / "staged").params)
    for path, value in flatten(load(tmp_path / "one").params).items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-3, err_msg=path)
