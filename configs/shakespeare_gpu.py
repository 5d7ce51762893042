"""nanoGPT's GPU setting on the works of Shakespeare, by characters, made small enough for a CPU.

    python benchmarks/shakespeare.py --text=shakespeare.txt --setting=gpu
    python train.py --config=configs/shakespeare_gpu.py --config.data.path=shakespeare.txt

nanoGPT (README): 6 layers, 6 heads, width 384 (10.6M parameters), context 256, batch 64, dropout
0.2, at most 5000 steps: best validation loss 1.4697. Claim: the same context and less of all else
(4 layers, width 256, 3.25M parameters, batch 32, 1000 steps: 8.2M characters against 82M) reach
1.460 with Muon. Time: 22 minutes on two cores of an AMD EPYC while tests ran beside it, in bfloat16
(0.78 s a step once they had ended).
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
    config.model.d_model = 256
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.d_ff = 704
    config.model.max_length = 256
    config.model.qk_norm = "head"
    config.model.dropout = 0.15

    config.train.steps = 1000
    config.train.compute_dtype = "bfloat16"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.schedule.name = "linear"
    config.schedule.warmup = 0.02
    config.schedule.floor = 0.0

    config.evaluation.every = 250
    config.checkpoint.every = 250
    config.sample.tokens = 0
    return config
