"""Mistral is read and written exactly, with its sliding window and its own head width."""

import dataclasses

import pytest
from family_checks import check_defaults, check_family

from model.families import FamilyError, config_from_hf, config_to_hf
from model.families.mistral import MISTRAL

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


@pytest.mark.parametrize("window", [4, None])
def test_mistral(window, tmp_path):
    heads = {"head_dim": 16, "tie_word_embeddings": True} if window is None else {}
    config = transformers.MistralConfig(**SIZES, sliding_window=window, **heads)
    assert check_family(config, tmp_path).config.sliding_window == window


def test_mistral_defaults():
    check_defaults(transformers.MistralConfig)


def test_an_absent_window_is_the_window_of_the_first_version():
    """Later versions, which have none, say null."""
    assert config_from_hf(MISTRAL, SIZES).sliding_window == 4096
    assert config_from_hf(MISTRAL, {**SIZES, "sliding_window": None}).sliding_window is None


def test_a_window_in_some_layers_is_refused():
    config = config_from_hf(MISTRAL, SIZES)
    mixed = dataclasses.replace(config, layer_overrides=((1, "sliding_window", None),))
    with pytest.raises(FamilyError, match="layer 1: sliding_window is None, there 4096"):
        config_to_hf(MISTRAL, mixed)


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias", "layer_types"])
def test_what_a_mistral_has_not_is_refused_by_name(name):
    with pytest.raises(FamilyError, match=name):
        config_from_hf(MISTRAL, {**SIZES, name: True})
