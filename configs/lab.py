"""The laboratory model: a 7.3M-parameter Llama on novels, small enough to come with the project.

    python train.py --config=configs/lab.py --config.data.path=TEXT
        --config.data.validation_path=HELD_OUT

Llama's block (arXiv 2302.13971) with grouped-query attention: 8 layers, width 256, 4 query heads on
2 key heads, 4096-entry BPE, tied embeddings. Its weights in bfloat16 are in assets/lab/, and every
command, table and plot of the documentation that needs a trained model uses them.

Claim: 7,344,384 parameters; one pass over 13.9M tokens of classic novels in the public domain (48
MB) reaches a validation loss of 3.602 nats a token, 1.395 bits a byte; about an hour on two CPU
cores (3,900 tokens/s).
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = default_config()
    config.name = "lab"

    config.data.path = "fiction.train.jsonl.gz"
    config.data.validation_path = "fiction.valid.jsonl.gz"
    config.data.tokenizer.kind = "bpe"
    config.data.tokenizer.vocab_size = 4096
    config.data.tokenizer.train_bytes = 24_000_000
    config.data.length = 512
    config.data.batch_size = 16

    config.model.vocab_size = 4096
    config.model.d_model = 256
    config.model.num_layers = 8
    config.model.num_heads = 4
    config.model.kv_heads = 2
    config.model.d_ff = 768
    config.model.max_length = 512
    config.model.tied_embeddings = True

    config.train.steps = 1700
    config.train.compute_dtype = "bfloat16"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.schedule.name = "linear"
    config.schedule.warmup = 0.02
    config.schedule.floor = 0.0

    config.evaluation.every = 250
    config.evaluation.batches = 16
    config.checkpoint.every = 250
    config.sample.tokens = 300
    return config
