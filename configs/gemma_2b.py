"""Gemma 2B (arXiv 2403.08295).

    python train.py --config=configs/gemma_2b.py --config.data.path=TEXT

Claim: 2,506,172,416 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gemma-2b"

    config.model.vocab_size = 256000
    config.model.d_model = 2048
    config.model.num_layers = 18
    config.model.num_heads = 8
    config.model.d_ff = 16384
    config.model.max_length = 8192
    config.model.kv_heads = 1
    config.model.head_dim = 256
    config.model.norm = "rmsnorm_plus_one"
    config.model.norm_eps = 1e-06
    config.model.activation = "gelu_tanh"
    config.model.tied_embeddings = True
    config.model.embedding_scale = 2048**0.5

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
