"""Qwen2 1.5B (arXiv 2407.10671).

    python train.py --config=configs/qwen2_1b5.py --config.data.path=TEXT

Claim: 1,543,714,304 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "qwen2-1b5"

    config.model.vocab_size = 151936
    config.model.d_model = 1536
    config.model.num_layers = 28
    config.model.num_heads = 12
    config.model.d_ff = 8960
    config.model.max_length = 32768
    config.model.kv_heads = 2
    config.model.rope_base = 1000000.0
    config.model.norm_eps = 1e-06
    config.model.qkv_bias = True
    config.model.tied_embeddings = True

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
