"""GPT-2 124M (Radford et al. 2019).

    python train.py --config=configs/gpt2.py --config.data.path=TEXT

Claim: 124,439,808 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gpt2"

    config.model.vocab_size = 50257
    config.model.d_model = 768
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.d_ff = 3072
    config.model.max_length = 1024
    config.model.feed_forward = "plain"
    config.model.activation = "gelu_tanh"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.positions = "learned"
    config.model.tied_embeddings = True
    config.model.qkv_bias = True
    config.model.output_bias = True

    config.data.length = 1024
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
