"""A small Llama on the source of Python's own standard library: the first thing to run.

python train.py --config=configs/quickstart.py
python train.py --config=configs/quickstart.py --config.data.path=my_texts/

Claim: on two CPU cores, two to three minutes from nothing to a validation loss of about 3.3 nats
per token (1.57 bits per byte) and text that looks like Python from afar. The exact loss depends on
the version of Python, whose library is the text.
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
    config.model.qk_norm = "head"
    config.model.tied_embeddings = True

    config.train.steps = 700
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.schedule.name = "linear"
    config.schedule.warmup = 0.02
    config.schedule.floor = 0.0

    config.evaluation.every = 100
    config.evaluation.batches = 10
    config.evaluation.final_batches = 60
    config.checkpoint.every = 100
    config.sample.tokens = 200
    return config
