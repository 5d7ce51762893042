"""BLOOM 7.1B (arXiv 2211.05100).

    python train.py --config=configs/bloom_7b1.py --config.data.path=TEXT

Claim: 7,069,016,064 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "bloom-7b1"

    config.model.vocab_size = 250880
    config.model.d_model = 4096
    config.model.num_layers = 30
    config.model.num_heads = 32
    config.model.d_ff = 16384
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "gelu_tanh"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.positions = "alibi"
    config.model.embed_norm = True
    config.model.tied_embeddings = True
    config.model.qkv_bias = True
    config.model.output_bias = True

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
