"""Llama 3 8B (arXiv 2407.21783).

    python train.py --config=configs/llama3_8b.py --config.data.path=TEXT

Claim: 8,030,261,248 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "llama3-8b"

    config.model.vocab_size = 128256
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 14336
    config.model.max_length = 8192
    config.model.kv_heads = 8
    config.model.rope_base = 500000.0

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
