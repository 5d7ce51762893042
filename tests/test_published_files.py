"""Published `config.json` files of the older families mean the built-in configs of their models.

The files are given with all that their libraries wrote then, but for token ids and dropout.
"""

import pytest

from model.families import FAMILIES, config_from_hf, differences
from training import load_config, run_config

NEOX = {
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
}
FILES = {
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "gptj_6b": {
        "model_type": "gptj",
        "gradient_checkpointing": False,
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_layer": 28,
        "n_positions": 2048,
        "rotary": True,
        "rotary_dim": 64,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "vocab_size": 50400,
    },
    "gpt_neox_20b": {
        "model_type": "gpt_neox",
        "attention_probs_dropout_prob": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "vocab_size": 50432,
        **NEOX,
    },
    "pythia_160m": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "use_parallel_residual": True,
        "vocab_size": 50304,
        **NEOX,
    },
    "gpt_neo_1b3": {
        "model_type": "gpt_neo",
        "activation_function": "gelu_new",
        "attention_layers": ["global", "local"] * 12,
        "attention_types": [[["global", "local"], 12]],
        "embed_dropout": 0,
        "hidden_size": 2048,
        "intermediate_size": None,
        "max_position_embeddings": 2048,
        "num_heads": 16,
        "num_layers": 24,
        "resid_dropout": 0,
        "vocab_size": 50257,
        "window_size": 256,
    },
    "opt_125m": {
        "model_type": "opt",
        "_remove_final_layer_norm": False,
        "do_layer_norm_before": True,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "prefix": "</s>",
        "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "opt_350m": {
        "model_type": "opt",
        "do_layer_norm_before": False,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "bloom_560m": {
        "model_type": "bloom",
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
        "vocab_size": 250880,
    },
    "crystal_7b": {
        "model_type": "crystalcoder",
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-5,
        "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.22,
        "mup_scale_qk_dot_by_d": True,
        "mup_width_scale": 0.0625,
        "n_embd": 4096,
        "n_head": 32,
        "n_inner": 10922,
        "n_layer": 32,
        "n_positions": 2048,
        "position_embedding_type": "rotary",
        "rotary_dim": 32,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "vocab_size": 32032,
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_means_the_built_in_config(name):
    values = FILES[name]
    family = next(f for f in FAMILIES.values() if values["model_type"] in f.model_types)
    theirs = config_from_hf(family, values)
    ours = run_config(load_config(f"configs/{name}.py")).model
    assert not differences(ours, theirs)
    assert ours.max_length == theirs.max_length
