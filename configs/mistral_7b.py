"""Mistral 7B v0.1 (arXiv 2310.06825).

    python train.py --config=configs/mistral_7b.py --config.data.path=TEXT

Claim: 7,241,732,096 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "mistral-7b"

    config.model.vocab_size = 32000
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 14336
    config.model.max_length = 32768
    config.model.kv_heads = 8
    config.model.sliding_window = 4096

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
