"""GPT-J 6B.

    python train.py --config=configs/gptj_6b.py --config.data.path=TEXT

Claim: 6,050,882,784 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gptj-6b"

    config.model.vocab_size = 50400
    config.model.d_model = 4096
    config.model.num_layers = 28
    config.model.num_heads = 16
    config.model.d_ff = 16384
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "gelu_tanh"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.residual = "parallel_one_norm"
    config.model.rotary_dim = 64
    config.model.rotary_layout = "interleaved"
    config.model.head_bias = True

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
