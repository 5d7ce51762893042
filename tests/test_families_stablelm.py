"""StableLM is read and written exactly, with its norms of single heads and its parallel layers."""

import numpy as np
import pytest
from family_checks import check_defaults, check_family

from model import count_parameters
from model.families import FamilyError, config_from_hf, import_checkpoint
from model.families.stablelm import STABLELM
from sharding import MeshConfig, make_layout, make_mesh

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


def test_stablelm(tmp_path):
    config = transformers.StableLmConfig(**SIZES, use_qkv_bias=True, tie_word_embeddings=True)
    assert check_family(config, tmp_path).config.rotary_dim == 2


def test_stablelm_with_head_norms_and_parallel_layers(tmp_path):
    """Each head's scale is a tensor of its own; also split over a mesh where key heads are not."""
    config = transformers.StableLmConfig(
        **SIZES,
        qk_layernorm=True,
        use_parallel_residual=True,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    )
    found = check_family(config, tmp_path)
    layout = make_layout(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    split = import_checkpoint(tmp_path / "theirs", layout=layout)
    for name in ("query_norm", "key_norm"):
        here, there = (
            tree.params["layers"]["000-002"]["attention"][name]["scale"] for tree in (found, split)
        )
        np.testing.assert_array_equal(here, there)
        assert not there.sharding.is_fully_replicated


def test_stablelm_defaults():
    check_defaults(transformers.StableLmConfig)


def test_stablelm_2_has_the_published_size():
    values = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": True,
        "vocab_size": 100352,
    }
    assert count_parameters(config_from_hf(STABLELM, values)) == 1_644_515_328


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotary_scaling_factor": 2.0}, "rotary_scaling_factor is 2.0"),
        ({"qk_layernorm": "full"}, "qk_layernorm is 'full'"),
        ({"rope_pct": 0.5}, "rope_pct = 0.5"),
    ],
)
def test_what_stablelm_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(FamilyError, match=message):
        config_from_hf(STABLELM, {**SIZES, **values})
