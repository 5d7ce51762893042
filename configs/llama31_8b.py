"""Llama 3.1 8B (arXiv 2407.21783).

    python train.py --config=configs/llama31_8b.py --config.data.path=TEXT

Claim: 8,030,261,248 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from model import RopeScaling
from training import default_config
from training.config import config_dict


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "llama31-8b"

    config.model.vocab_size = 128256
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 14336
    config.model.max_length = 131072
    config.model.kv_heads = 8
    config.model.rope_base = 500000.0
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
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
