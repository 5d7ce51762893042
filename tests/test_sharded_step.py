"""Training on a mesh: loss and parameters of one device, and no traffic but what is meant."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import weights
from model import ModelConfig, Runtime, abstract, init, rules
from model.block import block
from model.context import Context
from model.positions import PositionEncoder
from sharding import (
    MeshConfig,
    ShardingConfig,
    check_heads,
    derive_rules,
    global_batch,
    make_layout,
    make_mesh,
    partition,
)
from training.decoders import decoder
from training.objectives import language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.schedules import ScheduleConfig, make_schedule
from training.state import abstract_state, init_state, place
from training.step import make_step

BATCH, LENGTH, STEPS = 16, 32, 3


def _config(kv_heads=4, **fields):
    return ModelConfig(
        vocab_size=160,
        d_model=32,
        num_layers=2,
        num_heads=8,
        kv_heads=kv_heads,
        head_dim=12,
        d_ff=112,
        init_std=0.1,
        max_length=LENGTH,
        **fields,
    )


def _batches():
    """Packed documents with padding and a loss mask that leaves the rows with unequal targets."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        cuts = rng.integers(4, LENGTH - 4, (BATCH, 1))
        place_ = np.arange(LENGTH)[None]
        segments = np.where(place_ < cuts, 1, 2)
        segments[::3, -3:] = 0
        tokens = rng.integers(0, 160, (BATCH, LENGTH + 1))
        yield {
            "tokens": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "segment_ids": segments.astype(np.int32),
            "positions": np.where(place_ < cuts, place_, place_ - cuts).astype(np.int32),
            "loss_mask": ((rng.random((BATCH, LENGTH)) < 0.7) & (segments > 0)).astype(np.float32),
        }


def _train(config, layout=None, accumulation=1, model_rules=None):
    """`(losses, gradient norms, params)` of a few steps."""
    model_rules = model_rules or rules(config)
    params = abstract(config)
    settings = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    optimizer = make_optimizer(settings, params, model_rules)
    placement = None
    if layout is not None:
        placement = place(abstract_state(params, optimizer), model_rules, layout)
    step = make_step(
        language_model(z_loss=1e-3),
        decoder(config, Runtime(layout=layout)),
        optimizer,
        make_schedule(ScheduleConfig("constant", warmup=0), 1e-2, STEPS),
        accumulation=accumulation,
        clip_norm=1.0,
        placement=placement,
    )
    make = functools.partial(init, config)
    state = init_state(make, optimizer, jax.random.key(0), placement=placement)
    losses = []
    for batch in _batches():
        put = batch if layout is None else global_batch(batch, layout)
        state, metrics = step(state, put)
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "tokens")])
    return np.asarray(losses), weights.flatten(jax.tree.map(np.asarray, state.params))


@functools.cache
def _alone(config):
    return _train(config)


def _layout(config, sharding=None, **sizes):
    layout = make_layout(make_mesh(MeshConfig(**sizes)), sharding)
    return check_heads(layout, config.num_heads, config.kv_heads)


def _assert_equal(result, reference):
    np.testing.assert_allclose(result[0], reference[0], rtol=2e-5)
    assert result[1].keys() == reference[1].keys()
    for path, value in reference[1].items():
        np.testing.assert_allclose(result[1][path], value, rtol=0, atol=2e-5, err_msg=path)


MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4, "data": 2},
    "context": {"context": 8},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp-context": {"fsdp": 2, "context": 4},
    "tensor-context": {"tensor": 2, "context": 2, "data": 2},
    "fsdp-tensor-context": {"fsdp": 2, "tensor": 2, "context": 2},
}


ACCUMULATED = ("data", "data-fsdp-tensor", "fsdp-context", "tensor-context")


@pytest.fixture
def fast_compile():
    """Code that is not tuned compiles in half the time and computes the same."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [*((mesh, 1) for mesh in MESHES), *((mesh, 2) for mesh in ACCUMULATED)],
)
def test_training_on_a_mesh_equals_training_on_one_device(mesh, accumulation):
    config = _config()
    _assert_equal(_train(config, _layout(config, **MESHES[mesh]), accumulation), _alone(config))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("zero", [1, 2])
def test_every_zero_stage_gives_the_same_parameters(zero):
    config = _config()
    layout = _layout(config, ShardingConfig(zero=zero), fsdp=4, tensor=2)
    _assert_equal(_train(config, layout), _alone(config))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_few_key_heads_a_tied_head_and_gathered_context_train_the_same():
    config = _config(kv_heads=2, tied_embeddings=True, sliding_window=9, qkv_bias=True)
    gather = ShardingConfig(context_attention="all_gather")
    layout = _layout(config, gather, tensor=4, context=2)
    _assert_equal(_train(config, layout), _alone(config))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_derived_rules_train_the_same_as_the_models_own():
    config = _config()
    derived = derive_rules(abstract(config), "tensor", 4, fsdp=2, num_heads=8, kv_heads=4)
    layout = _layout(config, fsdp=2, tensor=4)
    own = _train(config, layout)
    np.testing.assert_allclose(_train(config, layout, model_rules=derived)[0][0], own[0][0])


def _gathered_shapes(text):
    """Shapes of the results of all all-gathers in a compiled program, without axes of size 1."""
    found = re.findall(r"= \(?([^=]*?) all-gather(?:-start)?\(", text)
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(found))
    return [tuple(int(n) for n in shape.split(",") if n not in ("", "1")) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor", "data-fsdp-tensor"])
def test_no_tensor_parallel_weight_is_ever_gathered_over_tensor(mesh):
    config = _config(kv_heads=8)
    layout = _layout(config, **MESHES[mesh])
    optimizer = make_optimizer(OptimizerConfig(), abstract(config), rules(config))
    state = abstract_state(abstract(config), optimizer)
    placement = place(state, rules(config), layout)
    step = make_step(
        language_model(),
        decoder(config, Runtime(layout=layout)),
        optimizer,
        make_schedule(ScheduleConfig("constant"), 1e-2, STEPS),
        placement=placement,
    )
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        placement.state,
    )
    text = step.lower(placed, global_batch(next(_batches()), layout)).compile().as_text()
    gathered = {tuple(sorted(shape)) for shape in _gathered_shapes(text)}
    split = {
        path: (leaf.shape, leaf.sharding.spec)
        for path, leaf in weights.flatten(placed.params).items()
        if "tensor" in leaf.sharding.spec
    }
    assert len(split) == 9
    for path, (shape, spec) in split.items():
        sizes = [
            {n} if name != "fsdp" else {n, n // 2} for n, name in zip(shape, spec, strict=True)
        ]
        for whole in itertools.product(*sizes):
            for stack in {whole, whole[len(shape) - 2 :]}:
                assert tuple(sorted(stack)) not in gathered, f"{path}: {stack} is gathered"
    assert "all-reduce" in text


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_tensor_parallel_block_sums_twice_each_way_and_sends_nothing_else(backward):
    config = _config(kv_heads=8)
    layout = _layout(config, tensor=8)
    layer = next(iter(config.segments)).layer
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    encoder = PositionEncoder(layer).prepared(positions)
    context = Context(positions, None, encoder, Runtime(layout=layout))
    (stack,) = abstract(config)["layers"].values()
    (shardings,) = partition(abstract(config), rules(config), layout)["layers"].values()

    def one_layer(x, sharding):
        sharding = jax.NamedSharding(layout.mesh, jax.P(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    whole = layout.sharding(("batch", "length", "hidden"))
    x = jax.ShapeDtypeStruct((2, LENGTH, 32), jnp.float32, sharding=whole)

    def forward(params, x):
        return block(params, x, layer, context)[0]

    def pull(params, x, cotangent):
        y, backward = jax.vjp(forward, params, x)
        return y, backward(cotangent)

    params = jax.tree.map(one_layer, stack, shardings)
    compiled = jax.jit(pull).lower(params, x, x) if backward else jax.jit(forward).lower(params, x)
    text = compiled.compile().as_text()
    traffic = re.findall(
        r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    assert set(traffic) == {"all-reduce"}
    assert len(traffic) <= 4 if backward else len(traffic) == 2
