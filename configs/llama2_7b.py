"""Llama 2 7B (arXiv 2307.09288).

    python train.py --config=configs/llama2_7b.py --config.data.path=TEXT

Claim: 6,738,415,616 parameters; the paper's rate, batch of 4M tokens and 2T tokens.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "llama2-7b"

    config.model.vocab_size = 32000
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 11008
    config.model.max_length = 4096

    config.data.length = 4096
    config.data.batch_size = 1024
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.steps = 476837

    config.optimizer.learning_rate = 0.0003
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.00419431
    config.schedule.floor = 0.1
    return config
