"""OPT is read from Hugging Face folders and written back, exactly."""

import numpy as np
import pytest
from family_checks import LENGTH, check_defaults, check_family, close, our_logits, random_model

from model import ModelConfig
from model.families import FAMILIES, FamilyError, config_from_hf, import_checkpoint

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
        {"_remove_final_layer_norm": True},
    ],
    ids=["plain", "350m", "galactica", "no_final_norm"],
)
def test_opt(options, tmp_path):
    check_family(transformers.OPTConfig(**SIZES, **options), tmp_path)


def test_positions_follow_from_the_mask(tmp_path):
    """OPT counts real tokens itself: left-padded rows are the same to both without position_ids."""
    model = random_model(transformers.OPTConfig(**SIZES))
    model.save_pretrained(tmp_path)
    found = import_checkpoint(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 40, (2, LENGTH)).astype(np.int32)
    mask = np.ones((2, LENGTH), np.int32)
    mask[1, :5] = 0
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    close(our_logits(found.params, tokens, mask, found.config), theirs, mask)


def test_defaults():
    check_defaults(transformers.OPTConfig)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learned_embeddings": False}, ["learned_embeddings", "False"]),
        ({"scale_embeddings": True}, ["scale_embeddings", "True"]),
        ({"activation_function": "quick_gelu"}, ["activation_function", "quick_gelu", "relu"]),
        ({"do_layer_norm_befor": False}, ["do_layer_norm_befor", "do_layer_norm_before"]),
    ],
)
def test_what_cannot_be_said_is_named(values, words):
    with pytest.raises(FamilyError) as caught:
        config_from_hf(FAMILIES["opt"], values)
    for word in words:
        assert word in str(caught.value)


def test_a_norm_without_arrays_norms_no_queries():
    with pytest.raises(ValueError, match="qk_norm='head' needs a norm with a scale"):
        ModelConfig(norm="layernorm_noaffine", qk_norm="head")
