"""Baichuan 2 7B (arXiv 2309.10305).

    python train.py --config=configs/baichuan2_7b.py --config.data.path=TEXT

Claim: 7,505,973,248 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "baichuan2-7b"

    config.model.vocab_size = 125696
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 11008
    config.model.max_length = 4096
    config.model.norm_eps = 1e-06
    config.model.head_norm = "row_normalised"

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
