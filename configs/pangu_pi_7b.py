"""PanGu-pi 7B (arXiv 2312.17276), without its series activation and augmented shortcut.

    python train.py --config=configs/pangu_pi_7b.py --config.data.path=TEXT

Claim: 6,695,555,072 parameters; the paper's rate and 4000 warm-up steps.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "pangu-pi-7b"

    config.model.vocab_size = 100883
    config.model.d_model = 4096
    config.model.num_layers = 29
    config.model.num_heads = 32
    config.model.d_ff = 11008
    config.model.max_length = 2048

    config.data.length = 2048
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"

    config.optimizer.learning_rate = 0.0003
    config.optimizer.b2 = 0.95
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.01
    config.schedule.floor = 0.1
    return config
