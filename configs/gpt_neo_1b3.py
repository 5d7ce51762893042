"""GPT-Neo 1.3B.

    python train.py --config=configs/gpt_neo_1b3.py --config.data.path=TEXT

Claim: 1,315,575,808 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gpt-neo-1b3"

    config.model.vocab_size = 50257
    config.model.d_model = 2048
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.d_ff = 8192
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "gelu_tanh"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.positions = "learned"
    config.model.tied_embeddings = True
    config.model.output_bias = True
    config.model.attention_scale = 1.0
    config.model.layer_overrides = tuple(
        (layer, "sliding_window", 256) for layer in range(1, 24, 2)
    )

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
