"""GPT-2, GPT-J, GPT-NeoX and GPT-Neo are read from Hugging Face folders and written back."""

import pytest
from family_checks import check_defaults, check_family

from model.families import FAMILIES, FamilyError, config_from_hf, config_to_hf

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

GPT_SIZES = {"vocab_size": 40, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "n_inner": 48,
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-3,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
        },
        {"scale_attn_weights": False, "tie_word_embeddings": False},
    ],
    ids=["plain", "inverse_layer", "unscaled_untied"],
)
def test_gpt2(options, tmp_path):
    check_family(transformers.GPT2Config(**GPT_SIZES, **options), tmp_path)


def test_gptj(tmp_path):
    check_family(transformers.GPTJConfig(**GPT_SIZES, rotary_dim=4), tmp_path)


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(parallel, tmp_path):
    """Parallel like Pythia, or one part after the other, here also without biases and tied."""
    rope = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    config = transformers.GPTNeoXConfig(
        **SIZES,
        use_parallel_residual=parallel,
        rope_parameters=rope if parallel else {**rope, "rope_type": "linear", "factor": 2.0},
        attention_bias=parallel,
        tie_word_embeddings=not parallel,
        hidden_act="gelu_new" if parallel else "gelu",
    )
    check_family(config, tmp_path)


def test_gpt_neo(tmp_path):
    """Every second layer sees a window, which here is shorter than the rows."""
    config = transformers.GPTNeoConfig(
        **{name: size for name, size in SIZES.items() if "num" not in name},
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    )
    check_family(config, tmp_path)


def test_defaults():
    check_defaults(transformers.GPT2Config)
    check_defaults(transformers.GPTJConfig)
    check_defaults(transformers.GPTNeoXConfig)
    check_defaults(transformers.GPTNeoConfig)


def test_published_files_are_understood():
    """Keys of older files mean what their libraries made of them."""
    neox = config_from_hf(
        FAMILIES["gpt_neox"],
        {
            "hidden_act": "gelu_fast",
            "attention_probs_dropout_prob": 0,
            "rotary_pct": 0.5,
            "rotary_emb_base": 20000,
            "use_parallel_residual": False,
        },
    ).resolve()
    assert (neox.rotary_dim, neox.rope_base, neox.residual) == (48, 20000.0, "sequential")
    assert neox.activation == "gelu_tanh"
    old = {"n_special": 0, "predict_special_tokens": True, "hidden_size": 1024, "n_ctx": 1024}
    assert config_from_hf(FAMILIES["gpt2"], old | {"n_head": 16}).d_model == 1024
    layers = ["global", "local"] * 12
    neo = {"attention_layers": layers, "attention_types": [[["global", "local"], 12]]}
    found = config_from_hf(FAMILIES["gpt_neo"], neo)
    assert [found.layer(n).sliding_window for n in range(3)] == [None, 256, None]
    assert config_to_hf(FAMILIES["gpt_neo"], found)["attention_types"] == neo["attention_types"]


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("gpt2", {"activation_function": "swiglu"}, ["activation_function", "swiglu"]),
        ("gpt2", {"mup_output_alpha": 2.0}, ["mup_output_alpha", "2.0"]),
        ("gptj", {"tie_word_embeddings": True}, ["tie_word_embeddings", "True"]),
        ("gpt_neox", {"rotary_base": 1e4}, ["rotary_base", "rotary_emb_base"]),
        ("gpt_neo", {"num_layers": 23}, ["attention_types", "24", "num_layers", "23"]),
        ("gpt_neo", {"attention_types": [[["sparse"], 24]]}, ["attention_types", "sparse"]),
        ("gpt_neo", {"attention_layers": ["global"] * 24}, ["attention_layers"]),
    ],
)
def test_what_cannot_be_said_is_named(family, values, words):
    with pytest.raises(FamilyError) as caught:
        config_from_hf(FAMILIES[family], values)
    for word in words:
        assert word in str(caught.value)
