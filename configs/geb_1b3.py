"""GEB 1.3B (arXiv 2406.09900).

    python train.py --config=configs/geb_1b3.py --config.data.path=TEXT

Claim: 1,348,044,800 parameters; its rotary layout (here ChatGLM's) and kind of norm are not
published; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "geb-1b3"

    config.model.vocab_size = 64896
    config.model.d_model = 2048
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.d_ff = 5632
    config.model.max_length = 4096
    config.model.kv_heads = 4
    config.model.rotary_dim = 64
    config.model.rotary_layout = "interleaved"

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
