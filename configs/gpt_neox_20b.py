"""GPT-NeoX 20B (arXiv 2204.06745).

    python train.py --config=configs/gpt_neox_20b.py --config.data.path=TEXT

Claim: 20,554,567,680 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gpt-neox-20b"

    config.model.vocab_size = 50432
    config.model.d_model = 6144
    config.model.num_layers = 44
    config.model.num_heads = 64
    config.model.d_ff = 24576
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "gelu_tanh"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.residual = "parallel_two_norms"
    config.model.rotary_dim = 24
    config.model.qkv_bias = True
    config.model.output_bias = True

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
