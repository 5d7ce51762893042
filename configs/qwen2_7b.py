"""Qwen2 7B (arXiv 2407.10671).

    python train.py --config=configs/qwen2_7b.py --config.data.path=TEXT

Claim: 7,615,616,512 parameters; the recipe is Sheaf's default, not the authors'.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "qwen2-7b"

    config.model.vocab_size = 152064
    config.model.d_model = 3584
    config.model.num_layers = 28
    config.model.num_heads = 28
    config.model.d_ff = 18944
    config.model.max_length = 32768
    config.model.kv_heads = 4
    config.model.rope_base = 1000000.0
    config.model.norm_eps = 1e-06
    config.model.qkv_bias = True
    config.model.tied_embeddings = False

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    return config
