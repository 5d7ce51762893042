"""Phi-3-mini 4K (arXiv 2404.14219).

    python train.py --config=configs/phi3_mini.py --config.data.path=TEXT

Claim: 3,821,079,552 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "phi3-mini"

    config.model.vocab_size = 32064
    config.model.d_model = 3072
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 8192
    config.model.max_length = 4096
    config.model.sliding_window = 2047

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
