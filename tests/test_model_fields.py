"""The fields that make families of one decoder: each computes what its paper, NumPy or transformers
computes, alone, padded, packed by layer, and through a cache.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model import (
    ModelConfig,
    PositionEncoder,
    RopeScaling,
    Runtime,
    abstract,
    count_parameters,
    forward,
    generate,
    hidden_states,
    init,
    init_cache,
    logits,
    rules,
)
from model.checkpoint import from_json
from sharding import MeshConfig, make_layout, make_mesh, partition
from weights import flatten

TINY = ModelConfig(vocab_size=40, d_model=32, num_layers=2, num_heads=4, kv_heads=2, d_ff=48)
LONG = RopeScaling("longrope", 4.0, 8, short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0,) * 4)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(1, 40, (2, 12)), jnp.int32)

apply = jax.jit(forward, static_argnames=("config", "runtime", "taps"))


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


def wide(x):
    return np.asarray(x, np.float64)


REFERENCES = {
    "rmsnorm": lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale,
    "rmsnorm_plus_one": lambda x, scale: REFERENCES["rmsnorm"](x, 1 + scale),
    "layernorm_nobias": lambda x, scale: REFERENCES["rmsnorm"](
        x - x.mean(-1, keepdims=True), scale
    ),
    "layernorm": lambda x, scale: REFERENCES["layernorm_nobias"](x, scale),
}


NORMED = [(norm, "each_head") for norm in REFERENCES]
NORMED += [("rmsnorm_plus_one", "head"), ("layernorm", "head"), ("layernorm", "full")]


@pytest.mark.parametrize(("norm", "over"), NORMED)
def test_queries_and_keys_are_normed_as_the_stream_is_but_without_a_bias(norm, over):
    config = dataclasses.replace(TINY, num_layers=1, norm=norm, qk_norm=over)
    params = params_of(config)
    _, aux = apply(params, TOKENS, config, taps=("embeddings", "layers/0/query", "layers/0/key"))
    layer = jax.tree.map(lambda leaf: wide(leaf[0]), params["layers"]["000-001"])
    stream = REFERENCES[norm](wide(aux["taps"]["embeddings"]), layer["attention_norm"]["scale"])
    stream = stream + layer["attention_norm"].get("bias", 0.0)
    for name, heads in (("query", 4), ("key", 2)):
        assert list(layer["attention"][f"{name}_norm"]) == ["scale"]
        scale = layer["attention"][f"{name}_norm"]["scale"]
        x = stream @ layer["attention"][name]["kernel"]
        if over == "full":
            x = REFERENCES[norm](x, scale)
        x = x.reshape(2, 12, heads, 8)
        if over != "full":
            x = REFERENCES[norm](x, scale.reshape(heads, 8) if over == "each_head" else scale)
        np.testing.assert_allclose(aux["taps"][f"layers/0/{name}"], x, atol=5e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_normalised_head_scores_by_direction_only(tied):
    config = dataclasses.replace(
        TINY, head_norm="row_normalised", tied_embeddings=tied, head_bias=not tied, logit_scale=2.0
    )
    params = jax.tree.map(jnp.array, params_of(config))
    if tied:
        rows = params["embed"]["table"].at[3].set(0.0)
        params = {**params, "embed": {"table": rows}}
    else:
        rows = params["head"]["kernel"].T.at[3].set(0.0)
        params = {**params, "head": {**params["head"], "kernel": rows.T}}
    hidden = jnp.asarray(RNG.normal(size=(2, 3, 32)), jnp.float32)
    bias = 0.0 if tied else wide(params["head"]["bias"])
    lengths = np.maximum(np.linalg.norm(wide(rows), axis=1), 1e-12)
    expected = 2.0 * (wide(hidden) @ (wide(rows) / lengths[:, None]).T + bias)
    np.testing.assert_allclose(logits(params, hidden, config), expected, atol=1e-5)
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(logits(p, hidden, config))))(params)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))


ALL = dataclasses.replace(
    TINY,
    d_embed=16,
    head_norm="row_normalised",
    final_norm=False,
    residual="sequential_normed",
    norm="layernorm",
    qk_norm="each_head",
    positions="alibi",
    alibi_scale=8**-0.5,
    alibi_dtype="bfloat16",
)


def test_the_new_arrays_are_described_counted_and_split_over_a_mesh():
    shapes = {path: leaf.shape for path, leaf in flatten(abstract(ALL)).items()}
    assert shapes["embed/table"] == (40, 16)
    assert shapes["embed_projection/kernel"] == (16, 32)
    assert shapes["head_projection/kernel"] == (32, 16)
    assert shapes["head/kernel"] == (16, 40)
    assert shapes["layers/000-002/attention/query_norm/scale"] == (2, 32)
    assert shapes["layers/000-002/attention/key_norm/scale"] == (2, 16)
    assert not [path for path in shapes if path.startswith("final_norm")]
    drawn = init(ALL, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in flatten(drawn).items()} == shapes
    assert sum(leaf.size for leaf in jax.tree.leaves(drawn)) == count_parameters(ALL)
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    placed = jax.device_put(params_of(ALL), partition(params_of(ALL), rules(ALL), layout))
    assert placed["embed_projection"]["kernel"].sharding.spec == P(None, "fsdp")
    scale = placed["layers"]["000-002"]["attention"]["query_norm"]["scale"]
    assert scale.sharding.spec == P(None, "tensor")
    tokens = jnp.tile(TOKENS, (2, 1))
    split, _ = apply(placed, tokens, ALL, Runtime(layout=layout))
    np.testing.assert_allclose(split, apply(params_of(ALL), tokens, ALL)[0], atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_embed": 0}, "model.d_embed is 0; it must be at least 1, or None"),
        ({"head_norm": "row_normalized"}, "'row_normalized'; nearest: row_normalised"),
        ({"qk_norm": "each_heads"}, "'each_heads'; nearest: each_head"),
        ({"alibi_scale": 0.0}, "model.alibi_scale is 0.0; it must be above 0"),
        ({"alibi_dtype": "bfloat"}, "'bfloat'; nearest: bfloat16"),
        (
            {"residual": "sequential_normed", "norm_position": "sandwich"},
            r"model\.residual='sequential_normed' .* model\.norm_position='pre' .*'sandwich'",
        ),
        (
            {"residual": "parallel_one_norm", "norm_position": "output"},
            r"model\.residual='parallel_one_norm' .* model\.norm_position='pre'",
        ),
        ({"layer_overrides": ((0, "d_embed", 8),)}, "not a field that may differ by layer"),
        ({"layer_overrides": ((0, "positions", "learned"),)}, "cannot differ by layer"),
        (
            {"rotary_dim": 2, "rope_scaling": RopeScaling("dynamic", 2.0)},
            "'dynamic' needs rotary_dim 4 or more, not 2",
        ),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


BY_LAYER = (
    {},
    {"rope_base": 100.0, "rope_scaling": None, "sliding_window": 4, "attention_scale": 0.2},
    {"rope_scaling": RopeScaling("linear", 2.0), "qk_norm": "each_head"},
    {"positions": "none"},
    {"positions": "alibi", "alibi_scale": 0.5},
)


def test_layers_that_see_positions_differently_equal_models_of_one_layer():
    base = dataclasses.replace(TINY, num_layers=5, rope_scaling=RopeScaling("llama3", 4.0, 16))
    overrides = tuple(
        (layer, field, value)
        for layer, changes in enumerate(BY_LAYER)
        for field, value in changes.items()
    )
    config = dataclasses.replace(base, layer_overrides=overrides)
    assert from_json(ModelConfig, json.loads(json.dumps(dataclasses.asdict(config))), "") == config
    params = params_of(config)
    names = tuple(f"layers/{layer}/hidden" for layer in range(5))
    _, aux = apply(params, TOKENS, config, taps=("embeddings", *names))
    x = aux["taps"]["embeddings"]
    for layer, changes in enumerate(BY_LAYER):
        one = dataclasses.replace(base, num_layers=1, final_norm=False, **changes)
        stack = params["layers"][f"{layer:03d}-{layer + 1:03d}"]
        x, _ = hidden_states({"layers": {"000-001": stack}}, None, one, inputs_embeds=x)
        np.testing.assert_allclose(aux["taps"][names[layer]], x, atol=2e-5)


PADDED = {
    "rope": TINY,
    "alibi": dataclasses.replace(TINY, positions="alibi"),
    "learned": dataclasses.replace(TINY, positions="learned", position_offset=2, max_length=12),
    "window": dataclasses.replace(TINY, sliding_window=3),
    "longrope": dataclasses.replace(TINY, rope_scaling=LONG),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_on_the_left_changes_no_logit_and_leaks_no_nan(name):
    config, params = PADDED[name], params_of(PADDED[name])
    real = [7, 5]
    mask = jnp.asarray([[0] * (12 - count) + [1] * count for count in real])
    padded = jnp.where(mask == 1, TOKENS, -1)  # no token at all, as bad as padding gets
    full, _ = apply(params, padded, config, segment_ids=mask)
    assert np.isfinite(np.asarray(full)).all()
    cache = init_cache(config, 2, 12, planned_length=8, chunk=12)
    cached, aux = apply(params, padded, config, segment_ids=mask, cache=cache)
    np.testing.assert_array_equal(aux["cache"].lengths, real)
    further, _ = apply(params, TOKENS[:, :1], config, cache=aux["cache"])
    # Each row without padding and with the same token after it; what stands further is never seen.
    rows = [jnp.concatenate([TOKENS[n, 12 - real[n] :], TOKENS[n, :1], TOKENS[n]]) for n in (0, 1)]
    alone, _ = apply(params, jnp.stack([row[:8] for row in rows]), config)
    for row, count in enumerate(real):
        for padded_logits in (full, cached):
            np.testing.assert_allclose(
                padded_logits[row, 12 - count :], alone[row, :count], atol=2e-5
            )
        np.testing.assert_allclose(further[row, 0], alone[row, count], atol=2e-5)


SHORT_ONLY = dataclasses.replace(LONG, long_factor=LONG.short_factor)
LONG_ONLY = dataclasses.replace(LONG, short_factor=LONG.long_factor)


def with_scaling(scaling, **changes):
    return dataclasses.replace(TINY, rope_scaling=scaling, **changes)


@pytest.mark.parametrize("count", [8, 9])
def test_longrope_goes_by_the_length_at_hand_or_planned_or_by_the_config(count):
    x, positions = jnp.ones((1, count, 1, 8)), jnp.arange(count)[None]

    def rotated(scaling, length=None, **changes):
        encoder = PositionEncoder(with_scaling(scaling, **changes).resolve(), length)
        return np.asarray(encoder.rotate(x, positions))

    short, long = rotated(SHORT_ONLY), rotated(LONG_ONLY)
    assert not np.allclose(short, long)
    np.testing.assert_array_equal(rotated(LONG), short if count == 8 else long)
    np.testing.assert_array_equal(rotated(LONG, 8), short)
    np.testing.assert_array_equal(rotated(LONG, 9), long)
    by_config = dataclasses.replace(LONG, select="config")
    np.testing.assert_array_equal(rotated(by_config, 9, max_length=8), short)
    np.testing.assert_array_equal(rotated(by_config, 8, max_length=9), long)


@pytest.mark.parametrize("scaling", [LONG, RopeScaling("dynamic", 4.0, 8)])
def test_a_cached_sequence_keeps_the_rotation_that_its_planned_length_asks_for(scaling):
    config, params = with_scaling(scaling), params_of(TINY)
    full, _ = apply(params, TOKENS[:, :11], config)
    cache, parts = init_cache(config, 2, 16, planned_length=11), []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11)):  # trained up to 8
        part, aux = apply(params, TOKENS[:, start:stop], config, cache=cache)
        cache, parts = aux["cache"], [*parts, part]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=2e-5)


def test_generation_decides_for_the_whole_sequence_before_its_first_token():
    def run(scaling, count):
        config = with_scaling(scaling, num_layers=1)
        return generate(params_of(config), [[1, 2, 3], [4]], config, max_new_tokens=count).lists()

    short, long = run(SHORT_ONLY, 9), run(LONG_ONLY, 9)
    assert run(LONG, 5) == [row[:5] for row in short]
    assert run(LONG, 9) == long != short
