"""InternLM2 1.8B (arXiv 2403.17297).

    python train.py --config=configs/internlm2_1b8.py --config.data.path=TEXT

Claim: 1,889,110,016 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "internlm2-1b8"

    config.model.vocab_size = 92544
    config.model.d_model = 2048
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.d_ff = 8192
    config.model.max_length = 32768
    config.model.kv_heads = 8
    config.model.rope_base = 1000000.0

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
