"""The decoder: packed documents stay apart, loops and segments change nothing, intermediates by
name.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import (
    POLICIES,
    Context,
    Decoder,
    ModelConfig,
    PositionEncoder,
    Runtime,
    abstract,
    block,
    forward,
    hidden_states,
    init,
    rules,
)
from sharding import MeshConfig, make_layout, make_mesh, partition

CONFIG = ModelConfig(vocab_size=31, d_model=16, num_layers=3, num_heads=4, kv_heads=2, d_ff=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 10)), jnp.int32)

apply = jax.jit(forward, static_argnames=("config", "runtime", "until_layer", "taps"))


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


def next_token_loss(params, config, runtime=Runtime(), tokens=TOKENS, rng=None):  # noqa: B008
    logits, _ = forward(params, tokens, config, runtime, rng=rng)
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()


@functools.cache
def loss_and_gradients(runtime):
    loss = functools.partial(next_token_loss, config=CONFIG, runtime=runtime)
    return jax.jit(jax.value_and_grad(loss))(params_of(CONFIG))


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
def test_packed_documents_give_the_logits_they_have_alone(positions):
    config = dataclasses.replace(CONFIG, positions=positions, sliding_window=4, max_length=16)
    params = params_of(config)
    first, second = TOKENS[:1, :6], TOKENS[1:, :3]
    packed = jnp.concatenate([first, second, jnp.zeros((1, 1), jnp.int32)], axis=1)
    places = jnp.asarray([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]])
    segments = jnp.asarray([[1] * 6 + [2] * 3 + [0]])
    logits, _ = apply(params, packed, config, positions=places, segment_ids=segments)
    counted, _ = apply(params, packed, config, segment_ids=segments)
    np.testing.assert_allclose(counted[:, :9], logits[:, :9], atol=2e-5)
    np.testing.assert_allclose(logits[:, :6], apply(params, first, config)[0], atol=2e-5)
    np.testing.assert_allclose(logits[:, 6:9], apply(params, second, config)[0], atol=2e-5)
    assert np.isfinite(np.asarray(logits)).all()


def test_a_change_in_one_document_changes_another_by_exactly_nothing():
    params = params_of(CONFIG)
    segments = jnp.asarray([[1] * 4 + [2] * 6, [1] * 7 + [2] * 3])
    run = functools.partial(apply, params, config=CONFIG, segment_ids=segments)
    changed = jnp.where(segments == 1, (TOKENS + 1) % 31, TOKENS)
    before, after = np.asarray(run(tokens=TOKENS)[0]), np.asarray(run(tokens=changed)[0])
    second = np.asarray(segments == 2)
    np.testing.assert_array_equal(before[second], after[second])
    assert not np.allclose(before[~second], after[~second])


def test_later_tokens_never_reach_earlier_ones():
    params = params_of(CONFIG)
    changed = TOKENS.at[:, 6:].set(0)
    before, after = apply(params, TOKENS, CONFIG)[0], apply(params, changed, CONFIG)[0]
    np.testing.assert_array_equal(before[:, :6], after[:, :6])


WAYS = {
    "unrolled": Runtime(scan_unroll=0),
    "unrolled by two": Runtime(scan_unroll=2),
    **{name: Runtime(remat=name) for name in POLICIES if name != "none"},
}


@pytest.mark.parametrize("way", WAYS)
def test_how_layers_run_does_not_change_loss_or_gradients(way):
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, loss_and_gradients(Runtime()), loss_and_gradients(WAYS[way]))


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "tensor": 4}, {"context": 2}]
)
def test_a_mesh_changes_neither_loss_nor_gradients(sizes):
    layout = make_layout(make_mesh(MeshConfig(**{"data": -1, **sizes})))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 31, (8, 12)), jnp.int32)
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0]] * 8)
    config = dataclasses.replace(CONFIG, vocab_size=32, sliding_window=4)
    params = params_of(config)

    def loss(params, runtime):
        logits, _ = forward(params, tokens, config, runtime, segment_ids=segments)
        return jnp.sum(jnp.sin(logits) * (segments > 0)[..., None]) / tokens.size

    placed = jax.device_put(params, partition(params, rules(config), layout))
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = run(params, Runtime())
    close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4)
    jax.tree.map(close, run(placed, Runtime(layout=layout)), expected)


def test_unequal_segments_equal_blocks_called_one_by_one():
    overrides = (
        (2, "d_ff", 8),
        (2, "kv_heads", 4),
        (2, "sliding_window", 3),
        (1, "rope_base", 50.0),
    )
    config = dataclasses.replace(CONFIG, layer_overrides=overrides)
    params = params_of(config)
    taps = ("embeddings", "layers/0/hidden", "layers/2/hidden", "layers/1/feed_forward_output")
    _, aux = apply(params, TOKENS, config, taps=taps)
    x = aux["taps"]["embeddings"]
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    for index, segment in enumerate(config.segments):
        layer = config.layer(index)
        context = Context(positions, None, PositionEncoder(layer), Runtime())
        one = jax.tree.map(lambda leaf: leaf[0], params["layers"][segment.name])
        x, _, _ = block(one, x, layer, context)
        if index != 1:
            np.testing.assert_allclose(aux["taps"][f"layers/{index}/hidden"], x, atol=1e-5)
    assert aux["taps"]["layers/1/feed_forward_output"].shape == x.shape


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 3},
        {"attention_soft_cap": 0.5, "attention_scale": 2.0},
        {"positions": "alibi"},
    ],
)
def test_attention_weights_are_those_that_mix_the_values(changes):
    config = dataclasses.replace(CONFIG, **changes)
    taps = tuple(f"layers/1/{name}" for name in ("attention_weights", "value", "attention_heads"))
    segments = jnp.asarray([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3])
    found = apply(params_of(config), TOKENS, config, segment_ids=segments, taps=taps)[1]["taps"]
    weights, values, heads = (np.asarray(found[name]) for name in taps)
    values = np.repeat(values, config.num_heads // values.shape[2], axis=2)
    mixed = np.einsum("bths,bshd->bthd", weights, values)
    np.testing.assert_allclose(mixed.reshape(heads.shape), heads, atol=1e-5)
    np.testing.assert_allclose(weights[1, :7].sum(-1), 1.0, atol=1e-5)
    assert not weights[0, 6:, :, :6].any()  # The second document does not see the first.


def test_until_layer_stops_there():
    params = params_of(CONFIG)
    early = hidden_states(params, TOKENS, CONFIG, until_layer=2)[0]
    shallow = dataclasses.replace(CONFIG, num_layers=2)
    stacks = {"000-002": jax.tree.map(lambda leaf: leaf[:2], params["layers"]["000-003"])}
    expected = hidden_states({**params, "layers": stacks}, TOKENS, shallow)[0]
    np.testing.assert_allclose(early, expected, atol=1e-6)
    none = hidden_states(params, TOKENS, CONFIG, until_layer=0, taps=("embeddings",))[1]
    np.testing.assert_allclose(none["taps"]["embeddings"], params["embed"]["table"][TOKENS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": ("layers/7/hidden",)}, r"layers/7/hidden': only layers 0\.\.2 are run"),
        ({"taps": ("layers/1/hiden",)}, "'hiden': nearest: hidden"),
        ({"taps": ("layer/1/hidden",)}, "neither 'embeddings' nor"),
        ({"until_layer": 4}, "until_layer is 4; the model has 3 layers"),
        ({"inputs_embeds": jnp.zeros((2, 10, 16))}, "exactly one of them"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        forward(params_of(CONFIG), TOKENS, CONFIG, **options)


def test_a_sequence_longer_than_learned_positions_is_refused():
    config = dataclasses.replace(CONFIG, positions="learned", max_length=8)
    with pytest.raises(ValueError, match="10 tokens is longer than the 8 learned positions"):
        forward(params_of(config), TOKENS, config)


def test_embeddings_may_come_from_outside():
    params = params_of(CONFIG)
    embeds = params["embed"]["table"][TOKENS]
    given = forward(params, None, CONFIG, inputs_embeds=embeds)[0]
    np.testing.assert_array_equal(given, forward(params, TOKENS, CONFIG)[0])


def test_a_tied_head_multiplies_by_the_table_and_multipliers_act_on_the_logits():
    tied = dataclasses.replace(CONFIG, tied_embeddings=True)
    params = params_of(tied)
    assert "head" not in params
    untied = {**params, "head": {"kernel": params["embed"]["table"].T}}
    plain = forward(untied, TOKENS, CONFIG)[0]
    np.testing.assert_allclose(forward(params, TOKENS, tied)[0], plain, atol=1e-5)
    scaled = dataclasses.replace(tied, logit_scale=0.5, logit_soft_cap=1.5)
    expected = 1.5 * np.tanh(0.5 * np.asarray(plain) / 1.5)
    np.testing.assert_allclose(forward(params, TOKENS, scaled)[0], expected, atol=1e-5)


def test_residual_and_embedding_scales():
    params = params_of(CONFIG)
    still = dataclasses.replace(CONFIG, residual_scale=0.0, embedding_scale=3.0)
    _, aux = forward(params, TOKENS, still, taps=("layers/2/hidden",))
    expected = 3.0 * params["embed"]["table"][TOKENS]
    np.testing.assert_allclose(aux["taps"]["layers/2/hidden"], expected, atol=1e-6)


def test_dropout_follows_its_key_and_keeps_the_mean():
    config = dataclasses.replace(CONFIG, dropout=0.3)
    params = params_of(config)
    loss = jax.jit(functools.partial(next_token_loss, config=config))
    same = [loss(params, rng=jax.random.key(seed)) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    np.testing.assert_allclose(loss(params), loss_and_gradients(Runtime())[0], rtol=1e-6)
    _, aux = forward(
        {**params, "embed": {"table": jnp.ones((31, 16))}},
        jnp.zeros((8, 64), jnp.int32),
        config,
        rng=jax.random.key(0),
        taps=("embeddings",),
        until_layer=0,
    )
    values = np.asarray(aux["taps"]["embeddings"])
    np.testing.assert_allclose(np.unique(values), [0.0, 1 / 0.7], rtol=1e-6)
    np.testing.assert_allclose(values.mean(), 1.0, atol=0.03)


def test_bfloat16_compute_keeps_float32_masters_gradients_and_logits():
    params, runtime = params_of(CONFIG), Runtime(compute_dtype="bfloat16")
    logits, aux = apply(params, TOKENS, CONFIG, runtime, taps=("layers/0/hidden",))
    assert logits.dtype == jnp.float32
    assert aux["taps"]["layers/0/hidden"].dtype == jnp.bfloat16
    exact = apply(params, TOKENS, CONFIG)[0]
    np.testing.assert_allclose(logits, exact, atol=0.05 * float(jnp.abs(exact).max()))
    _, gradients = loss_and_gradients(runtime)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_the_compiled_program_holds_no_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of(CONFIG))
        lowered = jax.jit(lambda params, tokens: forward(params, tokens, CONFIG)[0]).lower(
            params, TOKENS
        )
    assert "xf64" not in lowered.as_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_position": "post", "norm": "layernorm", "embed_norm": True},
        {"norm_position": "sandwich", "norm": "rmsnorm_plus_one", "qk_norm": "full"},
        {"residual": "parallel_two_norms", "qk_norm": "head", "norm": "layernorm_nobias"},
    ],
)
def test_every_topology_trains(changes):
    config = dataclasses.replace(CONFIG, num_layers=2, init_std=0.1, **changes)
    params = init(config, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(functools.partial(next_token_loss, config=config)))
    losses = []
    for _ in range(12):
        loss, gradients = step(params)
        assert all(np.abs(np.asarray(leaf)).sum() > 0 for leaf in jax.tree.leaves(gradients))
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, gradients)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3


def test_the_linen_module_uses_the_same_params_tree():
    module = Decoder(dataclasses.replace(CONFIG, dropout=0.2))
    variables = module.init(jax.random.key(0), TOKENS)
    params = params_of(CONFIG)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    logits, _ = module.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, forward(params, TOKENS, CONFIG)[0], atol=1e-6)
    key = {"dropout": jax.random.key(1)}
    dropped, _ = module.apply({"params": params}, TOKENS, deterministic=False, rngs=key)
    assert not np.allclose(dropped, logits)
