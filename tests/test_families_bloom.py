"""BLOOM is read from Hugging Face folders and written back, exactly."""

import numpy as np
import pytest
from family_checks import (
    check_defaults,
    check_family,
    close,
    our_logits,
    random_model,
    their_logits,
)
from safetensors.numpy import load_file, save_file

from model.families import FAMILIES, FamilyError, config_from_hf, import_checkpoint

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")


@pytest.mark.parametrize("heads", [8, 6])
def test_bloom(heads, tmp_path):
    """Eight heads as ever; six, whose slopes are cut out of sixteen, with the other residual."""
    config = transformers.BloomConfig(
        vocab_size=40,
        hidden_size=48,
        n_layer=2,
        n_head=heads,
        apply_residual_connection_post_layernorm=heads == 6,
        tie_word_embeddings=heads == 8,
    )
    check_family(config, tmp_path)


def test_names_without_prefix(tmp_path):
    """The published files of BLOOM leave out `transformer.`."""
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    assert "h.1.mlp.dense_4h_to_h.bias" in tensors
    save_file(tensors, path)
    found = import_checkpoint(tmp_path)
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    close(our_logits(found.params, tokens, None, found.config), their_logits(model, tokens))


def test_config_files():
    """Defaults are those of transformers, and the published files' own words are understood."""
    check_defaults(transformers.BloomConfig)
    published = {
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "slow_but_exact": False,
    }
    found = config_from_hf(FAMILIES["bloom"], published).resolve()
    assert (found.d_model, found.num_heads, found.d_ff, found.num_layers) == (1024, 16, 4096, 24)
    with pytest.raises(FamilyError, match="n_inner is 100; only 256"):
        config_from_hf(FAMILIES["bloom"], {"n_inner": 100})
    with pytest.raises(FamilyError, match="nearest: apply_residual_connection_post_layernorm"):
        config_from_hf(FAMILIES["bloom"], {"residual_connection_post_layernorm": True})
