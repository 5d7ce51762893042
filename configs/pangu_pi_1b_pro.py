"""PanGu-pi 1B Pro (arXiv 2312.17276), without its series activation and augmented shortcut.

    python train.py --config=configs/pangu_pi_1b_pro.py --config.data.path=TEXT

Claim: 951,983,872 parameters; the pro recipe's rates.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "pangu-pi-1b-pro"

    config.model.vocab_size = 48000
    config.model.d_model = 1792
    config.model.num_layers = 20
    config.model.num_heads = 14
    config.model.d_ff = 4864
    config.model.max_length = 2048

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"

    config.optimizer.learning_rate = 0.0001
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.03
    config.schedule.floor = 0.1
    return config
