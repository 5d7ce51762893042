"""Amber 7B (LLM360, arXiv 2312.06550).

    python train.py --config=configs/amber_7b.py --config.data.path=TEXT

Claim: 6,738,415,616 parameters; the published rates and order of 360 chunks of 1,706,976
sequences, 2240 a step.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "amber-7b"

    config.model.vocab_size = 32000
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 11008
    config.model.max_length = 2048
    config.model.norm_eps = 1e-06

    config.data.length = 2048
    config.data.batch_size = 2240
    config.data.seed = 11111
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.steps = 274335

    config.optimizer.learning_rate = 0.0003
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.00729036
    config.schedule.floor = 0.1
    return config
