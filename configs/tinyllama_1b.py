"""TinyLlama 1.1B (arXiv 2401.02385).

    python train.py --config=configs/tinyllama_1b.py --config.data.path=TEXT

Claim: 1,100,048,384 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "tinyllama-1b"

    config.model.vocab_size = 32000
    config.model.d_model = 2048
    config.model.num_layers = 22
    config.model.num_heads = 32
    config.model.d_ff = 5632
    config.model.max_length = 2048
    config.model.kv_heads = 4

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
