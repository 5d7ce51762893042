"""nanoGPT's GPU setting on the works of Shakespeare, by characters, as a Llama-style model.

python train.py --config=configs/shakespeare_gpu.py --config.data.path=shakespeare.txt
python benchmarks/shakespeare.py --text=shakespeare.txt --setting=gpu
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = default_config()
    config.name = "shakespeare-gpu"

    config.data.path = "shakespeare.txt"
    config.data.tokenizer.kind = "characters"
    config.data.length = 256
    config.data.batch_size = 32
    config.data.validation_fraction = 0.1
    config.data.validation_split = "tail"

    config.model.vocab_size = 65
    config.model.d_model = 384
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.d_ff = 1024
    config.model.max_length = 256
    config.model.qk_norm = "head"
    config.model.dropout = 0.1

    config.train.steps = 500
    config.train.compute_dtype = "bfloat16"
    config.train.scan_unroll = 0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.schedule.name = "linear"
    config.schedule.warmup = 0.02
    config.schedule.floor = 0.0

    config.evaluation.every = 100
    config.checkpoint.every = 100
    config.sample.tokens = 0
    return config
