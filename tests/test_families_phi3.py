"""Phi-3 is read and written exactly: packed projections, a window, LongRoPE on either side of the
trained length.
"""

import json

import pytest
from family_checks import check_defaults, check_family

from model import count_parameters
from model.families import FamilyError, config_from_hf, config_to_hf, differences
from model.families.phi3 import PHI3

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
    "pad_token_id": 0,
}
SHORT, LONG = [1.0, 1.5, 2.0], [1.5, 4.0, 9.0]


def test_phi3_with_a_window(tmp_path):
    found = check_family(transformers.Phi3Config(**SIZES, sliding_window=4), tmp_path)
    assert found.config.sliding_window == 4


@pytest.mark.parametrize(("trained", "factor"), [(4, None), (32, 3.0)])
def test_phi3_beyond_the_trained_length_and_within_it(trained, factor, tmp_path):
    """12 tokens of a model trained at 4 turn by the long factors, of one trained at 32 by the
    short ones, where a factor of its own goes before the ratio of lengths; 6 of 8 channels turn.
    """
    given = {} if factor is None else {"factor": factor}
    config = transformers.Phi3Config(
        **SIZES,
        original_max_position_embeddings=trained,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "partial_rotary_factor": 0.75,
            **given,
        },
    )
    found = check_family(config, tmp_path)
    assert found.config.rotary_dim == 6
    scaling = found.config.rope_scaling
    assert scaling is not None
    assert scaling.factor == (factor or 64 / trained)


def test_phi3_defaults():
    check_defaults(transformers.Phi3Config)


def test_phi4_mini_is_understood_in_both_spellings():
    """The first files call LongRoPE "su"; transformers names it in `rope_parameters`."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    values = {
        **{"attention_bias": False, "lm_head_bias": False, "mlp_bias": False},
        **{"full_attn_mod": 1, "interpolate_factor": 1, "sliding_window": 262144},
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **factors},
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    }
    config = config_from_hf(PHI3, values)
    assert count_parameters(config) == 3_836_021_760
    older = {**values, "rope_scaling": {"type": "su", **factors}}
    assert config_from_hf(PHI3, older) == config
    theirs = transformers.Phi3Config(**json.loads(json.dumps(values))).to_dict()
    assert config_from_hf(PHI3, theirs) == config
    assert not differences(config_from_hf(PHI3, config_to_hf(PHI3, config)), config)


def test_phi3_mini_has_the_published_size():
    config = config_from_hf(PHI3, {"sliding_window": 2047, "rope_scaling": None})
    assert count_parameters(config) == 3_821_079_552


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'; Phi-3 knows 'longrope'"),
        ({"rope_scaling": {"type": "yarn", "long_factor": LONG}}, "rope_scaling.long_factor"),
        ({"lm_head_bias": True}, "lm_head_bias is True"),
        ({"blocksparse_params": {}}, "blocksparse_params = {}"),
    ],
)
def test_what_phi3_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(FamilyError, match=message):
        config_from_hf(PHI3, {**SIZES, **values})
