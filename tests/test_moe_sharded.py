"""Expert parallelism: outputs, statistics, gradients and training steps of one device, and no
traffic of experts' weights.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharded_step import _assert_equal, _layout, _train, fast_compile

from model import ModelConfig, Runtime, abstract, forward, init, init_cache, rules
from sharding import partition
from weights import flatten

__all__ = ["fast_compile"]

BATCH, LENGTH, EXPERTS = 8, 16, 8

MESHES = {
    "expert": {"expert": 8},
    "expert-tensor": {"expert": 4, "tensor": 2},
    "fsdp-expert-tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data-context-expert": {"data": 2, "context": 2, "expert": 2},
    "context-tensor": {"context": 4, "tensor": 2},
}


def _config(**fields):
    sizes = {"vocab_size": 160, "d_model": 32, "num_layers": 2, "num_heads": 8, "kv_heads": 4}
    mixture = {
        "mixer": "attention_experts",
        "feed_forward": "experts",
        "num_experts": EXPERTS,
        "expert_d_ff": 24,
        "shared_expert_d_ff": 16,
        "shared_expert_gate": True,
        "expert_bias": True,
    }
    return ModelConfig(**{**sizes, "head_dim": 6, "init_std": 0.15, **mixture, **fields})


def _tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 160, (BATCH, LENGTH)).astype(np.int32)
    lengths = np.asarray([16, 12, 16, 3, 16, 16, 9, 16])
    return tokens, (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)


def _run(config, layout=None, remat="none"):
    """Loss with auxiliary losses, logits where there is a token, statistics, gradients."""
    tokens, segments = _tokens()
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    if layout is not None:
        params = jax.device_put(params, partition(abstract(config), rules(config), layout))
        rows = layout.sharding(("batch", "length"))
        tokens, segments = jax.device_put((tokens, segments), rows)

    def loss(params, tokens, segments):
        runtime = Runtime(layout=layout, remat=remat)
        logits, aux = forward(params, tokens, config, runtime, segment_ids=segments)
        logits = logits * segments[..., None]
        extra = sum(
            0.1 * jnp.sum(aux[f"{prefix}{name}"])
            for prefix in ("", "attention_")
            for name in ("load_balance", "router_z")
        )
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1)) + extra, (logits, aux)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, aux)), gradients = step(params, tokens, segments)
    return {"loss": value, "logits": logits, **aux}, flatten(gradients)


@functools.cache
def _alone(config):
    return jax.tree.map(np.asarray, _run(config))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    ("mesh", "capacity"),
    [
        ("expert", None),
        ("expert-tensor", None),
        ("fsdp-expert-tensor", 0.75),
        ("data-context-expert", None),
        ("data-context-expert", 0.75),
        ("context-tensor", None),
    ],
)
def test_experts_on_a_mesh_compute_what_one_device_computes(mesh, capacity):
    config = _config(capacity_factor=capacity)
    remat = "full" if "tensor" in mesh else "dots"
    results, gradients = _run(config, _layout(config, **MESHES[mesh]), remat)
    expected, of_params = _alone(config)
    assert np.all((expected["dropped"] > 0.05) == (capacity is not None))
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for path, value in of_params.items():
        np.testing.assert_allclose(gradients[path], value, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    ("mesh", "capacity", "accumulation"),
    [
        ("expert", None, 1),
        ("fsdp-expert-tensor", None, 2),
        ("data-context-expert", 1.0, 1),
    ],
)
def test_training_experts_on_a_mesh_equals_training_on_one_device(mesh, capacity, accumulation):
    config = _config(capacity_factor=capacity, max_length=32, init_std=0.1)
    layout = _layout(config, **MESHES[mesh])
    _assert_equal(_train(config, layout, accumulation), _train(config, None, accumulation))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_one_row_decodes_on_a_mesh_that_no_token_divides_over():
    config = _config(num_layers=1)
    layout = _layout(config, expert=4, context=2)
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    placed = jax.device_put(params, partition(abstract(config), rules(config), layout))
    tokens = jnp.asarray([[3, 1, 4, 1, 5]])

    @functools.partial(jax.jit, static_argnums=1)
    def decode(params, layout):
        runtime = Runtime(layout=layout)
        cache = init_cache(config, 1, 5, layout=layout)
        first, aux = forward(params, tokens[:, :4], config, runtime, cache=cache)
        last, _ = forward(params, tokens[:, 4:], config, runtime, cache=aux["cache"])
        return jnp.concatenate([first, last], axis=1)

    np.testing.assert_allclose(decode(placed, layout), decode(params, None), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 1.0], ids=["dropless", "capacity"])
def test_tokens_travel_and_experts_stay(capacity):
    config = _config(capacity_factor=capacity, mixer="attention", num_layers=1, qk_norm="none")
    layout = _layout(config, fsdp=2, expert=4)
    shardings = partition(abstract(config), rules(config), layout)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract(config), shardings
    )
    rows = layout.sharding(("batch", "length"))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=rows)

    def loss(params, tokens):
        return jnp.mean(forward(params, tokens, config, Runtime(layout=layout))[0] ** 2)

    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    assert ("all-to-all" in text) == (capacity is not None)
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    sizes = {
        tuple(sorted(int(n) for n in shape.split(",") if n not in ("", "1"))) for shape in gathered
    }
    assert (2, 24, 32) in sizes  # two experts of this device, whole in d_model
    assert (8, 24, 32) not in sizes
    assert (8, 16, 24) not in sizes


def test_experts_that_do_not_divide_name_the_axis_the_sizes_and_a_mesh():
    config = _config(num_experts=6)
    layout = _layout(config, expert=4, data=2)
    with pytest.raises(ValueError, match=r"\(experts\) of size 6 does not divide over expert=4"):
        partition(abstract(config), rules(config), layout)
    params = abstract(config)
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    with pytest.raises(
        ValueError, match="6 experts do not divide over 4 devices of mesh axis 'exp"
    ):
        jax.eval_shape(
            lambda params, tokens: forward(params, tokens, config, Runtime(layout=layout)),
            params,
            tokens,
        )
