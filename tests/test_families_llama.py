"""Llama and its relatives are read from Hugging Face folders and written back, exactly."""

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
}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_llama(name, tmp_path):
    scaling = SCALINGS[name]
    rope = None if scaling is None else {"rope_theta": 500.0, **scaling}
    check_family(
        transformers.LlamaConfig(
            **SIZES,
            rope_parameters=rope,
            attention_bias=name == "linear",
            mlp_bias=name == "linear",
            tie_word_embeddings=name == "llama3",
            head_dim=16 if name == "yarn" else None,
        ),
        tmp_path,
    )


def test_llama_defaults():
    check_defaults(transformers.LlamaConfig)
