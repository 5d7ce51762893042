"""What a config refuses, how layers that differ are cut into segments, and how arrays are
described.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from model import ModelConfig, RopeScaling, Runtime, abstract, count_parameters, init, mup, rules
from model.config import NAMES
from sharding import match_rules
from weights import flatten

TINY = ModelConfig(vocab_size=40, d_model=16, num_layers=3, num_heads=4, kv_heads=2, d_ff=24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, r"num_heads 4 is not a multiple of model.kv_heads 3; .* \[1, 2, 4\]"),
        ({"d_model": 18}, "d_model 18 is not a multiple of model.num_heads 4"),
        ({"rotary_dim": 3}, "rotary_dim is 3; it must be even and at most head_dim 4"),
        ({"rotary_dim": 6}, "rotary_dim is 6; it must be even and at most head_dim 4"),
        ({"activation": "sliu"}, "model.activation is 'sliu'; nearest: silu"),
        ({"mixer": "attentoin"}, "model.mixer is 'attentoin'; nearest: attention"),
        ({"norm": "rms"}, "model.norm is 'rms'; nearest: rmsnorm"),
        ({"vocab_size": 0}, "model.vocab_size is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"model.dropout is 1.0; it must be in \[0, 1\)"),
        ({"head_bias": True, "tied_embeddings": True}, "head_bias needs a head of its own"),
        ({"layer_overrides": ((3, "d_ff", 8),)}, r"the layers are 0\.\.2"),
        ({"layer_overrides": ((0, "d_f", 8),)}, "nearest: d_ff"),
        ({"layer_overrides": ((0, "vocab_size", 8),)}, "not a field that may differ by layer"),
        ({"layer_overrides": ((1, "kv_heads", 3),)}, "not a multiple of model.kv_heads 3"),
        (
            {"rope_scaling": RopeScaling("longrope", 2.0, short_factor=(1.0,))},
            "short_factor has 1 values; rotary_dim 4 needs 2",
        ),
    ],
)
def test_a_config_that_cannot_be_built_says_what_would_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_wrong_runtime_and_scaling_names_are_refused():
    with pytest.raises(ValueError, match="'ful'; nearest: full"):
        Runtime(remat="ful")
    with pytest.raises(ValueError, match="'plane'; nearest: plain"):
        Runtime(attention="plane")
    with pytest.raises(ValueError, match=r"rope_scaling\.kind is 'yarm'; nearest: yarn"):
        RopeScaling("yarm")


def test_equal_neighbours_share_a_segment_and_overrides_cut_it():
    assert [segment.name for segment in TINY.segments] == ["000-003"]
    config = dataclasses.replace(TINY, layer_overrides=((2, "d_ff", 8), (0, "d_ff", 24)))
    assert [segment.name for segment in config.segments] == ["000-002", "002-003"]
    assert [config.layer(index).d_ff for index in range(3)] == [24, 24, 8]
    shapes = {path: leaf.shape for path, leaf in flatten(abstract(config)).items()}
    assert shapes["layers/000-002/feed_forward/up/kernel"] == (2, 16, 24)
    assert shapes["layers/002-003/feed_forward/up/kernel"] == (1, 16, 8)


CONFIGS = {
    "llama": TINY,
    "untied_biases": dataclasses.replace(
        TINY,
        norm="layernorm",
        positions="learned",
        max_length=32,
        position_offset=2,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        head_bias=True,
        embed_norm=True,
        feed_forward="plain",
    ),
    "sandwich_segments": dataclasses.replace(
        TINY,
        norm_position="sandwich",
        qk_norm="full",
        tied_embeddings=True,
        layer_overrides=((1, "kv_heads", 4), (1, "qk_norm", "head")),
    ),
    "parallel": dataclasses.replace(TINY, residual="parallel_one_norm"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_init_abstract_rules_and_count_describe_the_same_arrays(name):
    config = CONFIGS[name]
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    same = jax.tree.map(
        lambda real, wanted: (real.shape, real.dtype) == (wanted.shape, wanted.dtype),
        params,
        abstract(config),
    )
    assert all(jax.tree.leaves(same))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count_parameters(config)
    matched = match_rules(rules(config), flatten(params))
    for path, leaf in flatten(params).items():
        rule = matched[path]
        assert len(rule.axes_at(path)) == leaf.ndim
        values = np.asarray(leaf)
        if rule.init == "normal" and values.size > 500:
            np.testing.assert_allclose(values.std(), rule.scale, rtol=0.2)
            assert abs(values.mean()) < 0.2 * rule.scale
        assert rule.weight_decay == (1.0 if rule.init == "normal" else 0.0)


def test_initial_values_do_not_depend_on_how_layers_are_cut():
    whole = init(TINY, jax.random.key(3))
    cut = init(
        dataclasses.replace(TINY, layer_overrides=((2, "norm_eps", 1e-3),)), jax.random.key(3)
    )
    for path, leaf in flatten(whole["layers"]["000-003"]).items():
        parts = [flatten(cut["layers"][name])[path] for name in ("000-002", "002-003")]
        np.testing.assert_array_equal(leaf, np.concatenate(parts))
    kernel = np.asarray(whole["layers"]["000-003"]["attention"]["query"]["kernel"])
    assert not np.allclose(kernel[0], kernel[1])


def test_mup_scales_hidden_matrices_by_width_and_leaves_the_base_model_as_it_is():
    base = mup(TINY, base_d_model=16, base_head_dim=4)
    assert rules(base) == rules(dataclasses.replace(TINY, base_d_model=16))
    assert (base.logit_scale, base.attention_scale) == (1.0, 0.5)
    wide = mup(dataclasses.replace(TINY, d_model=64, d_ff=96), base_d_model=16, base_head_dim=4)
    assert (wide.logit_scale, wide.attention_scale) == (0.25, 2 / 16)
    of = {rule.pattern: rule for rule in rules(wide)}
    query = next(rule for pattern, rule in of.items() if pattern.endswith("query/kernel"))
    assert (query.learning_rate, query.scale) == (0.25, 0.02 * 0.5)
    assert of["embed/table"].learning_rate == 1.0


def test_every_field_has_a_line_in_its_class_docstring():
    for cls in (ModelConfig, RopeScaling, Runtime):
        lines = re.findall(r"^ {4}(\w+): \S", cls.__doc__, flags=re.MULTILINE)
        assert lines == [field.name for field in dataclasses.fields(cls)]
    assert set(NAMES) <= {field.name for field in dataclasses.fields(ModelConfig)}
