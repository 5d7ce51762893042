"""Mixtral 8x7B (arXiv 2401.04088).

    python train.py --config=configs/mixtral_8x7b.py --config.data.path=TEXT

Claim: 46,702,792,704 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "mixtral-8x7b"

    config.model.vocab_size = 32000
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 14336
    config.model.max_length = 32768
    config.model.kv_heads = 8
    config.model.rope_base = 1000000.0
    config.model.feed_forward = "experts"
    config.model.num_experts = 8
    config.model.experts_per_token = 2

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
