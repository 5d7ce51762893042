"""A small Llama on the source of Python's own standard library: the first thing to run.

    make quickstart            (or: python train.py --config=configs/quickstart.py)
    python train.py --config=configs/quickstart.py --config.data.path=my_texts/

Claim: on two CPU cores it takes two to three minutes.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = default_config()
    config.name = "quickstart"

    config.data.path = "stdlib:"
    config.data.stdlib_bytes = 16_000_000
    config.data.tokenizer.kind = "bpe"
    config.data.tokenizer.vocab_size = 2048
    config.data.length = 128
    config.data.batch_size = 16

    config.model.vocab_size = 2048
    config.model.d_model = 192
    config.model.num_layers = 4
    config.model.num_heads = 6
    config.model.kv_heads = 2
    config.model.max_length = 128
    config.model.tied_embeddings = True

    config.train.steps = 600
    config.train.scan_unroll = 0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.schedule.name = "wsd"

    config.evaluation.every = 200
    config.evaluation.batches = 20
    config.evaluation.final_batches = 100
    config.checkpoint.every = 200
    config.sample.tokens = 200
    return config
