"""K2 65B (LLM360).

    python train.py --config=configs/k2_65b.py --config.data.path=TEXT

Claim: 65,286,184,960 parameters; the published run: 338,760 steps of 2040 sequences.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "k2-65b"

    config.model.vocab_size = 32032
    config.model.d_model = 8192
    config.model.num_layers = 80
    config.model.num_heads = 64
    config.model.d_ff = 22016
    config.model.max_length = 2048

    config.data.length = 2048
    config.data.batch_size = 2040
    config.data.seed = 22238
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.steps = 338760

    config.optimizer.learning_rate = 0.00015
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.00590388
    config.schedule.floor = 0.1
    return config
