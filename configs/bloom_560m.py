"""BLOOM 560M (arXiv 2211.05100).

    python train.py --config=configs/bloom_560m.py --config.data.path=TEXT

Claim: 559,214,592 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "bloom-560m"

    config.model.vocab_size = 250880
    config.model.d_model = 1024
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.d_ff = 4096
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
