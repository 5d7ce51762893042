"""nanoGPT's CPU setting on the works of Shakespeare, by characters, as a Llama-style model.

    python benchmarks/shakespeare.py --text=shakespeare.txt --setting=cpu
    python train.py --config=configs/shakespeare_cpu.py --config.data.path=shakespeare.txt

nanoGPT (README, "I only have a macbook"): 4 layers, 4 heads, width 128, context 64, batch 12, 2000
steps, validation loss 1.88. Claim: the same sizes and steps, fewer parameters (0.77M), reach 1.55
nats per character on all of the last tenth of the text, and pass 1.88 by step 500 (1.86 on a
sample of it). Muon at 1e-2, RMS-normalised queries and keys, a linear schedule to zero. Tried: 3e-2
gives 1.573, no weight decay 1.556. Time: 1.5 minutes on two cores of an AMD EPYC.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = default_config()
    config.name = "shakespeare-cpu"

    config.data.path = "shakespeare.txt"
    config.data.tokenizer.kind = "characters"
    config.data.length = 64
    config.data.batch_size = 12
    config.data.validation_fraction = 0.1
    config.data.validation_split = "tail"

    config.model.vocab_size = 65
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.d_ff = 320
    config.model.max_length = 64
    config.model.qk_norm = "head"

    config.train.steps = 2000
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.schedule.name = "linear"
    config.schedule.warmup = 0.02
    config.schedule.floor = 0.0

    config.evaluation.every = 500
    config.evaluation.batches = 20
    config.checkpoint.every = 0
    config.sample.tokens = 0
    return config
