"""OPT 125M (arXiv 2205.01068).

    python train.py --config=configs/opt_125m.py --config.data.path=TEXT

Claim: 125,239,296 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "opt-125m"

    config.model.vocab_size = 50272
    config.model.d_model = 768
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.d_ff = 3072
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "relu"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.positions = "learned"
    config.model.position_offset = 2
    config.model.tied_embeddings = True
    config.model.qkv_bias = True
    config.model.output_bias = True

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
