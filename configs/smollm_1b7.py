"""SmolLM 1.7B.

    python train.py --config=configs/smollm_1b7.py --config.data.path=TEXT

Claim: 1,711,376,384 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "smollm-1b7"

    config.model.vocab_size = 49152
    config.model.d_model = 2048
    config.model.num_layers = 24
    config.model.num_heads = 32
    config.model.d_ff = 8192
    config.model.max_length = 2048
    config.model.tied_embeddings = True

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
