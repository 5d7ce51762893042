"""MiniCPM 1.2B (arXiv 2404.06395).

    python train.py --config=configs/minicpm_1b.py --config.data.path=TEXT

Claim: 1,247,442,432 without the embedding; the WSD schedule and the base rate of 0.01 are the
paper's, its batch is not known.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "minicpm-1b"

    config.model.vocab_size = 73440
    config.model.d_model = 1536
    config.model.num_layers = 52
    config.model.num_heads = 24
    config.model.d_ff = 3840
    config.model.max_length = 4096
    config.model.kv_heads = 8
    config.model.tied_embeddings = True
    config.model.embedding_scale = 12.0
    config.model.residual_scale = 1.4 / 52**0.5
    config.model.logit_scale = 256 / 1536
    config.model.base_d_model = 256
    config.model.init_std = 0.1

    config.data.length = 4096
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"

    config.optimizer.learning_rate = 0.01
    config.optimizer.b2 = 0.95
    config.schedule.name = "wsd"
    config.schedule.decay = 0.1
    return config
