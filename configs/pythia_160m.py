"""Pythia 160m (arXiv 2304.01373).

    python train.py --config=configs/pythia_160m.py --config.data.path=TEXT

Claim: 162,322,944 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "pythia-160m"

    config.model.vocab_size = 50304
    config.model.d_model = 768
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.d_ff = 3072
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "gelu"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.residual = "parallel_two_norms"
    config.model.rotary_dim = 16
    config.model.qkv_bias = True
    config.model.output_bias = True

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
