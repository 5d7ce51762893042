"""Llama 3.2 1B.

    python train.py --config=configs/llama32_1b.py --config.data.path=TEXT

Claim: 1,235,814,400 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from model import RopeScaling
from training import default_config
from training.config import config_dict


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "llama32-1b"

    config.model.vocab_size = 128256
    config.model.d_model = 2048
    config.model.num_layers = 16
    config.model.num_heads = 32
    config.model.d_ff = 8192
    config.model.max_length = 131072
    config.model.kv_heads = 8
    config.model.rope_base = 500000.0
    config.model.tied_embeddings = True
    scaling = RopeScaling(
        kind="llama3",
        factor=32.0,
        original_max_length=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    with config.ignore_type():
        config.model.rope_scaling = config_dict(scaling)

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
