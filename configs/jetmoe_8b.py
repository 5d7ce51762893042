"""JetMoE 8B (arXiv 2404.07413).

    python train.py --config=configs/jetmoe_8b.py --config.data.path=TEXT

Claim: 8,522,237,952 parameters; 2,331,445,248 of them act on a token; the recipe is Sheaf's
default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "jetmoe-8b"

    config.model.vocab_size = 32000
    config.model.d_model = 2048
    config.model.num_layers = 24
    config.model.num_heads = 32
    config.model.kv_heads = 16
    config.model.head_dim = 128
    config.model.max_length = 4096
    config.model.mixer = "attention_experts"
    config.model.feed_forward = "experts"
    config.model.num_experts = 8
    config.model.experts_per_token = 2
    config.model.d_ff = 5632
    config.model.expert_bias = True
    config.model.norm_eps = 1e-06
    config.model.final_norm_eps = 1e-05
    config.model.tied_embeddings = True
    config.model.init_std = 0.01

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
