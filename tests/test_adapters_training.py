"""What training with adapters costs, and that a mesh changes nothing in what they become."""

import functools
import re

import jax
import numpy as np
import pytest

from model import ModelConfig, Runtime, abstract, init, rules
from sharding import MeshConfig, global_batch, make_layout, make_mesh
from surgery.adapt import LoRA, adapters, attach, without_adapters
from training.decoders import decoder
from training.objectives import language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.schedules import ScheduleConfig, make_schedule
from training.state import abstract_state, init_state, place
from training.step import make_step
from training.trainable import by_patterns, everything, split_trainable
from weights import flatten

BATCH, LENGTH, STEPS = 8, 16, 3
CONFIG = ModelConfig(
    vocab_size=56, d_model=24, num_layers=2, num_heads=4, kv_heads=2, head_dim=10, d_ff=88,
    max_length=LENGTH,
)  # fmt: skip
SETTINGS = LoRA(rank=2, alpha=8)


def make_params(key, adapted=True):
    params = init(CONFIG, key)
    return attach(params, SETTINGS) if adapted else params


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def stepping(adapted=True, layout=None, unroll=1):
    """The compiled step's function, its first state (a function) and the abstract one."""
    make = functools.partial(make_params, adapted=adapted)
    params = jax.eval_shape(make, jax.random.key(0))
    ours = by_patterns([r".*/kernel/(a|b)"], params) if adapted else everything
    model_rules = rules(CONFIG)
    trained = split_trainable(params, ours)[0]
    optimizer = make_optimizer(OptimizerConfig(eps=1e-3), trained, model_rules)
    state = abstract_state(params, optimizer, ours)
    placement = None if layout is None else place(state, model_rules, layout, ours)
    step = make_step(
        language_model(),
        decoder(CONFIG, Runtime(layout=layout, scan_unroll=unroll)),
        optimizer,
        make_schedule(ScheduleConfig("constant", warmup=0), 1e-2, STEPS),
        trainable=ours,
        placement=placement,
    )
    start = lambda: init_state(make, optimizer, jax.random.key(0), ours, placement=placement)  # noqa: E731
    return step, start, state


def products(text):
    """Shapes of the results of all matrix products of a compiled program, sides in order."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    return [tuple(sorted(int(n) for n in shape.split(",") if n != "1")) for shape in found]


def test_a_step_that_trains_adapters_forms_no_gradient_of_their_bases():
    """No product of a whole step has the shape of a base: neither its gradient nor `a b`."""
    shapes = {
        tuple(sorted(weight.shape[-2:]))
        for path, weight in flatten(abstract(CONFIG)).items()
        if path.startswith("layers/") and path.endswith("/kernel")
    }
    assert len(shapes) == 3  # query as output, key as value, gate and up as down
    batch, counted = next(batches()), {}
    for adapted in (False, True):
        step, _, state = stepping(adapted, unroll=0)
        compiled = step.lower(state, batch).compile()
        made = [shape for shape in products(compiled.as_text()) if shape in shapes]
        counted[adapted] = len(made), compiled.cost_analysis()["flops"]
    layers = CONFIG.num_layers
    assert counted[False][0] == 7 * layers
    assert counted[True][0] == 0
    spared = (
        2
        * BATCH
        * LENGTH
        * sum(
            np.prod(weight.shape)
            for path, weight in flatten(abstract(CONFIG)).items()
            if path.endswith("/kernel")
        )
    )
    assert counted[False][1] - counted[True][1] > 0.5 * spared


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}])
def test_adapters_trained_on_a_mesh_are_those_trained_on_one_device(sizes):
    def train(layout):
        step, start, _ = stepping(layout=layout)
        state, losses = start(), []
        for batch in batches():
            put = batch if layout is None else global_batch(batch, layout)
            state, metrics = step(state, put)
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        return losses, jax.device_get(state.params)

    layout = make_layout(make_mesh(MeshConfig(**sizes)))
    (losses, params), (found_losses, found) = train(None), train(layout)
    np.testing.assert_allclose(found_losses, losses, rtol=2e-5)
    for path, part in adapters(params).items():
        for name, value in part.items():
            np.testing.assert_allclose(adapters(found)[path][name], value, atol=2e-5, err_msg=path)
        assert np.abs(part["b"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, without_adapters(found), without_adapters(params))
