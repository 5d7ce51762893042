"""Qwen 2 and 3 are read and written exactly: biases, norms of the heads, windows by layer."""

import dataclasses

import pytest
from family_checks import check_defaults, check_family

from model.families import FamilyError, config_from_hf, config_to_hf
from model.families.qwen2 import QWEN2

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def windows_of(config):
    return [config.layer(index).sliding_window for index in range(config.num_layers)]


def test_qwen2_without_windows(tmp_path):
    """What all published ones are: a window that is not used, and YaRN for longer prompts."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = transformers.Qwen2Config(
        **SIZES,
        use_sliding_window=False,
        sliding_window=4,
        max_window_layers=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 500.0, **yarn},
    )
    assert windows_of(check_family(config, tmp_path).config) == [None, None]


def test_qwen2_with_windows_in_the_last_layers(tmp_path):
    config = transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    assert windows_of(check_family(config, tmp_path).config) == [None, 4]


def test_qwen3_with_layer_types(tmp_path):
    """Windows that `max_window_layers` cannot say, and heads wider than `hidden_size` has."""
    config = transformers.Qwen3Config(
        **SIZES,
        head_dim=12,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    assert windows_of(check_family(config, tmp_path).config) == [4, None]


@pytest.mark.parametrize("name", ["Qwen2Config", "Qwen3Config"])
def test_qwen_defaults(name):
    check_defaults(getattr(transformers, name))


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ([None, None, None], {"use_sliding_window": False, "max_window_layers": 3}),
        ([5, 5, 5], {"use_sliding_window": True, "max_window_layers": 0}),
        ([None, 5, 5], {"use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_windows_are_written_with_the_keys_that_every_version_reads(layers, keys):
    plain = config_from_hf(QWEN2, {**SIZES, "num_hidden_layers": 3})
    overrides = tuple((index, "sliding_window", width) for index, width in enumerate(layers))
    values = config_to_hf(QWEN2, dataclasses.replace(plain, layer_overrides=overrides))
    assert {name: values[name] for name in keys} == keys
    assert "layer_types" not in values
    assert windows_of(config_from_hf(QWEN2, values)) == layers


def test_windows_of_two_widths_are_refused():
    plain = config_from_hf(QWEN2, SIZES)
    overrides = ((0, "sliding_window", 5), (1, "sliding_window", 6))
    with pytest.raises(FamilyError, match=r"model.sliding_window is 5, 6 in different layers"):
        config_to_hf(QWEN2, dataclasses.replace(plain, layer_overrides=overrides))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types has 'chunked'; known"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is False"),
        ({"use_mrope": True}, "use_mrope is True; only False"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ],
)
def test_what_a_qwen_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(FamilyError, match=message):
        config_from_hf(QWEN2, {**SIZES, **values})
