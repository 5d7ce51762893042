"""Gemma 1, 2 and 3 are read and written exactly: norms, soft caps, windows, two rotary bases."""

import dataclasses
import json

import numpy as np
import pytest
from family_checks import (
    check_defaults,
    check_family,
    check_forward,
    close,
    random_model,
    tensors_of,
    their_logits,
)

from model import count_parameters
from model.config import RopeScaling
from model.families import (
    FamilyError,
    config_from_hf,
    config_to_hf,
    export_checkpoint,
    import_checkpoint,
)
from model.families.gemma import GEMMA, GEMMA2
from model.families.gemma3 import GEMMA3, GEMMA3_IMAGES

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
    "head_dim": 12,
    "max_position_embeddings": 64,
}
WINDOWS = {"sliding_window": 4, "query_pre_attn_scalar": 24}


def test_gemma(tmp_path):
    """One key head, wider heads than d_model says, tied; "gelu" means the approximation."""
    sizes = {**SIZES, "num_key_value_heads": 1}
    found = check_family(transformers.GemmaConfig(**sizes, hidden_act="gelu"), tmp_path)
    assert found.config.activation == "gelu_tanh"
    assert found.config.tied_embeddings


@pytest.mark.parametrize("variant", ["published", "untied"])
def test_gemma2(variant, tmp_path):
    changes = {}
    if variant == "untied":
        changes = {
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 2.0,
        }
    found = check_family(transformers.Gemma2Config(**SIZES, **WINDOWS, **changes), tmp_path)
    windows = [found.config.layer(layer).sliding_window for layer in (0, 1)]
    assert windows == ([4, None] if variant == "published" else [None, 4])


def test_gemma3(tmp_path):
    """Three layers: the windows turn faster, and only the others are scaled."""
    config = transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        **WINDOWS,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
        },
        final_logit_softcapping=5.0,
    )
    found = check_family(config, tmp_path)
    layers = [found.config.layer(layer) for layer in range(3)]
    assert [layer.rope_base for layer in layers] == [50.0, 700.0, 50.0]
    assert [layer.sliding_window for layer in layers] == [4, None, 4]


def test_both_spellings_of_gemma3_are_one_model():
    """Files from before `rope_parameters` and `layer_types`; every sixth layer sees all."""
    old = {
        **SIZES,
        "num_hidden_layers": 7,
        "sliding_window_pattern": 3,
        "rope_theta": 700.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "cache_implementation": "hybrid",
    }
    new = config_to_hf(GEMMA3, config_from_hf(GEMMA3, old))
    theirs = json.loads(json.dumps(transformers.Gemma3TextConfig(**old).to_dict(), default=str))
    config = config_from_hf(GEMMA3, old)
    assert config_from_hf(GEMMA3, theirs) == config == config_from_hf(GEMMA3, new)
    assert new["layer_types"].count("full_attention") == 2
    assert config.layer(2).rope_scaling == RopeScaling("linear", 8.0, original_max_length=64)
    assert config.layer(3).rope_scaling is None


def test_the_text_part_of_a_gemma3_with_images(tmp_path):
    """It computes what the whole model computes on text, and is written as a text model."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config={**SIZES, **WINDOWS}, vision_config=vision, mm_tokens_per_image=4
    )
    model = random_model(config)
    model.save_pretrained(tmp_path / "theirs")
    found = import_checkpoint(tmp_path / "theirs")
    check_forward(model, found, SIZES["vocab_size"])
    export_checkpoint(found, tmp_path / "ours")
    theirs = tensors_of(tmp_path / "theirs")
    text = {name.removeprefix("language_model."): value for name, value in theirs.items()}
    written = tensors_of(tmp_path / "ours")
    assert written == {name: text[name] for name in written}
    loaded = transformers.Gemma3ForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    tokens = np.arange(3, 15)[None]
    close(their_logits(loaded.eval(), tokens), their_logits(model, tokens))
    assert import_checkpoint(tmp_path / "ours").config == found.config


@pytest.mark.parametrize(
    "config_class", ["GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "Gemma3Config"]
)
def test_gemma_defaults(config_class):
    check_defaults(getattr(transformers, config_class))


PUBLISHED = {
    "2b": (GEMMA, 2_506_172_416),
    "2-2b": (GEMMA2, 2_614_341_888),
    "3-1b": (GEMMA3, 999_885_952),
}
FILES = {
    "2b": {
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "2-2b": {
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "3-1b": {
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_understood_and_have_the_published_sizes(name):
    family, parameters = PUBLISHED[name]
    assert count_parameters(config_from_hf(family, FILES[name])) == parameters


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA, {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        (GEMMA2, {"attn_softcapping": 50.0}, "attn_softcapping.*nearest: attn_logit_softcapping"),
        (GEMMA2, {"layer_types": ["full_attention"] * 3}, "3 entries for 2 layers"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters has 'rope_theta'"),
        (GEMMA3_IMAGES, {"text_config": {"d_model": 3}}, "d_model = 3"),
    ],
)
def test_what_gemma_cannot_be_is_refused_by_name(family, values, message):
    sizes = {} if family is GEMMA3_IMAGES else SIZES
    with pytest.raises(FamilyError, match=message):
        config_from_hf(family, {**sizes, **values})


def test_windows_of_two_widths_cannot_be_written():
    config = config_from_hf(GEMMA3, {**SIZES, "num_hidden_layers": 3})
    mixed = dataclasses.replace(config, layer_overrides=((1, "sliding_window", 7),))
    with pytest.raises(FamilyError, match="layer 1: sliding_window is 7, there 4096"):
        config_to_hf(GEMMA3, mixed)
