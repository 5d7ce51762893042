"""OLMo 2 is read and written exactly: norms after each part, and over whole rows of q and k."""

import pytest
from family_checks import check_defaults, check_family

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


@pytest.mark.parametrize("bias", [False, True])
def test_olmo2(bias, tmp_path):
    check_family(
        transformers.Olmo2Config(**SIZES, attention_bias=bias, tie_word_embeddings=bias), tmp_path
    )


def test_olmo2_defaults():
    check_defaults(transformers.Olmo2Config)
