"""MiniCPM is read and written exactly, held to NumPy and to Granite, which has the same factors."""

import json
import math
import shutil

import pytest
from family_checks import check_defaults, check_family, check_forward, random_model, tensors_of
from numpy_decoder import Decoder, Layer, check_reference, random_tensors, rotate_half

from model import count_parameters
from model.config import ModelConfig, mup
from model.families import (
    FamilyError,
    config_from_hf,
    describe_as,
    differences,
    export_checkpoint,
    import_checkpoint,
)
from model.families.granite import GRANITE
from model.families.minicpm import MINICPM

D, F, V, LAYERS = 32, 48, 40, 3
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MULTIPLIERS = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 12}
VALUES = {
    **SIZES,
    **MULTIPLIERS,
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "rope_theta": 500.0,
}
SHAPES = {
    "input_layernorm": (D,),
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (16, D),
    "self_attn.v_proj": (16, D),
    "self_attn.o_proj": (D, D),
    "post_attention_layernorm": (D,),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}


def minicpm(wide, length):
    """Factors as the authors' code applies them, one after the other."""
    layers = [
        Layer(*(wide[f"model.layers.{i}.{name}.weight"] for name in SHAPES)) for i in range(LAYERS)
    ]
    embed = wide["model.embed_tokens.weight"]
    return Decoder(
        embed,
        layers,
        wide["model.norm.weight"],
        embed,
        8,
        1e-5,
        lambda x: rotate_half(x, 500.0),
        embedding_scale=3,
        residual_scale=1.4 / math.sqrt(LAYERS),
        logit_scale=1 / (D / 12),
    )


def test_minicpm(tmp_path):
    shapes = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    outer = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    check_reference(VALUES, random_tensors({**shapes, **outer}), minicpm, tmp_path)


@pytest.mark.interop
def test_granite_and_minicpm_with_its_factors(tmp_path):
    """A Granite is exact as itself, and as the MiniCPM whose factors are the same."""
    transformers = pytest.importorskip("transformers")
    factors = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 1.4 / math.sqrt(LAYERS),
        "logits_scaling": D / 12,
        "attention_multiplier": 8**-0.5,
    }
    config = transformers.GraniteConfig(
        **SIZES, **factors, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}
    )
    granite = check_family(config, tmp_path)
    folder = tmp_path / "minicpm"
    shutil.copytree(tmp_path / "theirs", folder)
    (folder / "config.json").write_text(json.dumps(VALUES))
    found = import_checkpoint(folder)
    assert not differences(found.config, granite.config)
    check_forward(random_model(config), found, V)
    assert tensors_of(export_checkpoint(found, tmp_path / "again")) == tensors_of(folder)


@pytest.mark.interop
def test_granite_with_biases_and_a_scaling_of_scores(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GraniteConfig(
        **{**SIZES, "tie_word_embeddings": False, "num_hidden_layers": 2},
        attention_multiplier=0.2,
        logits_scaling=8.0,
        attention_bias=True,
        mlp_bias=True,
    )
    assert check_family(config, tmp_path).config.attention_scale == 0.2
    check_defaults(transformers.GraniteConfig)


def test_published_files_are_understood_and_have_the_published_sizes():
    values = {
        **{"hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40},
        **{"num_attention_heads": 36, "num_key_value_heads": 36, "vocab_size": 122753},
        **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "rope_scaling": None},
        **{"num_experts": 0, "sparse_config": None, "mup_denominator": 32},
    }
    config = config_from_hf(MINICPM, values)
    assert count_parameters(config) == 2_724_880_896
    assert config.residual_scale == pytest.approx(1.4 / 40**0.5)
    assert config.logit_scale == pytest.approx(1 / 9)


def test_a_model_with_mup_is_written_as_granite():
    """The factors of muP are what Granite's config can say and Llama's cannot."""
    config = mup(ModelConfig(d_model=64, num_layers=2, residual_scale=0.3), base_d_model=16)
    family, values = describe_as(config)
    assert family is GRANITE
    assert values["logits_scaling"] == 4


def test_scores_of_another_scale_are_no_minicpm():
    config = ModelConfig(d_model=64, num_heads=4, attention_scale=0.3)
    with pytest.raises(FamilyError, match=r"model\.attention_scale is 0\.3, there 0\.25"):
        describe_as(config, "minicpm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 8}, "num_experts is 8"),
        ({"sparse_config": {"topk": 64}}, "sparse_config is"),
        ({"hidden_act": "fatrelu"}, "hidden_act is 'fatrelu'"),
        ({"scale_depht": 1.4}, "scale_depht.*nearest: scale_depth"),
    ],
)
def test_what_minicpm_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(FamilyError, match=message):
        config_from_hf(MINICPM, {**VALUES, **values})
