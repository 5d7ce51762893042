"""Falcon, in all its shapes, is read from Hugging Face folders and written back, exactly."""

import pytest
from family_checks import check_defaults, check_family

from model.families import FAMILIES, FamilyError, config_from_hf, config_to_hf

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "7b": {},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "2_11b": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 48,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "rw": {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
}


@pytest.mark.parametrize("name", SHAPES)
def test_falcon(name, tmp_path):
    # with ALiBi, transformers' eager attention adds the bias twice
    attention = "sdpa" if name == "rw" else "eager"
    config = transformers.FalconConfig(**SIZES, **SHAPES[name])
    check_family(config, tmp_path, attention=attention)


def test_defaults():
    check_defaults(transformers.FalconConfig)


def test_old_files():
    """Those of 40B say n_head_kv and mean the new architecture; they are written as Falcon."""
    falcon = FAMILIES["falcon"]
    old = {
        "model_type": "RefinedWeb",
        "apply_residual_connection_post_layernorm": False,
        "n_head": 128,
        "n_head_kv": 8,
        "n_layer": 60,
        "hidden_size": 8192,
        "parallel_attn": True,
    }
    found = config_from_hf(falcon, old)
    assert (found.kv_heads, found.num_layers, found.residual) == (8, 60, "parallel_two_norms")
    written = config_to_hf(falcon, found, old)
    assert (written["model_type"], written["num_kv_heads"]) == ("falcon", 8)
    assert written["new_decoder_architecture"]
    assert "n_head" not in written
    small = {"model_type": "RefinedWebModel", "n_head": 71, "n_layer": 32, "multi_query": True}
    assert config_from_hf(falcon, small).kv_heads == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"new_decoder_architecture": True, "parallel_attn": False}, ["parallel_attn", "False"]),
        ({"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn", "2"]),
        ({"apply_residual_connection_post_layernorm": True}, ["apply_residual", "True"]),
        ({"n_head_k": 8}, ["n_head_k", "n_head_kv"]),
    ],
)
def test_what_cannot_be_said_is_named(values, words):
    with pytest.raises(FamilyError) as caught:
        config_from_hf(FAMILIES["falcon"], values)
    for word in words:
        assert word in str(caught.value)
